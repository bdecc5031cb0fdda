//! The C functions are igvm's; a static library has to name the crate to hold them.
pub use igvm::c_api::*;
