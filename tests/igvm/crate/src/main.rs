//! Reads paths of IGVM files from standard input, one a line, and writes a line for each:
//! `ok`, its content in a plain notation and its digests, or `error`, or `panic`.  A digest is
//! `digest SOURCE TYPE HEX`: SOURCE is `crate` for the crate's own computing, and `igvmmeasure` for
//! the algorithm of COCONUT-SVSM's tool of that name (tools/igvmmeasure),
//! written anew here; TYPE is the IgvmPlatformType.
//! `igvm-peer --time FILE N` parses one file N times and prints the nanoseconds of each;
//! `igvm-peer --time-measure FILE N` parses and measures it for SEV-SNP as igvmmeasure does.

use igvm::{IgvmDirectiveHeader as D, IgvmFile, IgvmInitializationHeader as I, IgvmPlatformHeader as P};
use igvm_defs::{IgvmPageDataType, IgvmPlatformType};
use sha2::{Digest, Sha256, Sha384};
use std::io::{BufRead, Write};
use std::panic::{catch_unwind, AssertUnwindSafe};
use zerocopy::IntoBytes;

fn crc(data: &[u8]) -> String {
    format!("{}:{:08x}", data.len(), crc32fast::hash(data))
}

fn platform(header: &P) -> String {
    let P::SupportedPlatform(p) = header;
    format!(
        "SUPPORTED_PLATFORM {} {} {} {} {}",
        p.compatibility_mask, p.highest_vtl, p.platform_type.0, p.platform_version, p.shared_gpa_boundary
    )
}

fn initialization(header: &I) -> String {
    match header {
        I::GuestPolicy { policy, compatibility_mask } => format!("GUEST_POLICY {policy} {compatibility_mask}"),
        I::CcaPolicy {
            compatibility_mask,
            attributes_required_zeroes,
            attributes_required_ones,
            hash_algorithm,
            lfa_policy,
        } => format!(
            "CCA_POLICY {compatibility_mask} {attributes_required_zeroes} {attributes_required_ones} {} {}",
            hash_algorithm.0, lfa_policy.0
        ),
        I::RelocatableRegion {
            compatibility_mask,
            relocation_alignment,
            relocation_region_gpa,
            relocation_region_size,
            minimum_relocation_gpa,
            maximum_relocation_gpa,
            is_vtl2,
            apply_rip_offset,
            apply_gdtr_offset,
            vp_index,
            vtl,
        } => {
            let flags = *is_vtl2 as u8 | (*apply_rip_offset as u8) << 1 | (*apply_gdtr_offset as u8) << 2;
            format!(
                "RELOCATABLE_REGION {compatibility_mask} {vp_index} {} {flags} {relocation_alignment} \
                 {relocation_region_gpa} {relocation_region_size} {minimum_relocation_gpa} {maximum_relocation_gpa}",
                u8::from(*vtl)
            )
        }
        I::PageTableRelocationRegion { compatibility_mask, gpa, size, used_size, vp_index, vtl } => format!(
            "PAGE_TABLE_RELOCATION_REGION {compatibility_mask} {vp_index} {} {gpa} {size} {used_size}",
            u8::from(*vtl)
        ),
        I::CorimDocument { compatibility_mask, document } => {
            format!("CORIM_DOCUMENT {compatibility_mask} {}", crc(document))
        }
        I::CorimSignature { compatibility_mask, signature } => {
            format!("CORIM_SIGNATURE {compatibility_mask} {}", crc(signature))
        }
    }
}

fn directive(header: &D) -> String {
    let parameter = |name: &str, p: &igvm_defs::IGVM_VHS_PARAMETER| {
        format!("{name} {} {}", p.parameter_area_index, p.byte_offset)
    };
    match header {
        D::PageData { gpa, compatibility_mask, flags, data_type, data } => format!(
            "PAGE_DATA {gpa} {compatibility_mask} {} {} {}",
            u32::from(*flags),
            data_type.0,
            crc(data)
        ),
        D::ParameterArea { number_of_bytes, parameter_area_index, initial_data } => {
            format!("PARAMETER_AREA {number_of_bytes} {parameter_area_index} {}", crc(initial_data))
        }
        D::VpCount(p) => parameter("VP_COUNT_PARAMETER", p),
        D::EnvironmentInfo(p) => parameter("ENVIRONMENT_INFO_PARAMETER", p),
        D::Srat(p) => parameter("SRAT", p),
        D::Madt(p) => parameter("MADT", p),
        D::Slit(p) => parameter("SLIT", p),
        D::Pptt(p) => parameter("PPTT", p),
        D::MmioRanges(p) => parameter("MMIO_RANGES", p),
        D::MemoryMap(p) => parameter("MEMORY_MAP", p),
        D::CommandLine(p) => parameter("COMMAND_LINE", p),
        D::DeviceTree(p) => parameter("DEVICE_TREE", p),
        D::RequiredMemory { gpa, compatibility_mask, number_of_bytes, vtl2_protectable } => format!(
            "REQUIRED_MEMORY {gpa} {compatibility_mask} {number_of_bytes} {}",
            *vtl2_protectable as u8
        ),
        D::SnpVpContext { gpa, compatibility_mask, vp_index, vmsa } => format!(
            "VP_CONTEXT {gpa} {compatibility_mask} {vp_index} {}",
            crc(vmsa.as_bytes())
        ),
        D::X64NativeVpContext { compatibility_mask, vp_index, context } => {
            format!("VP_CONTEXT native {compatibility_mask} {vp_index} {}", crc(context.as_bytes()))
        }
        D::AArch64CcaVpContext { compatibility_mask, vp_index, context } => {
            format!("VP_CONTEXT cca {compatibility_mask} {vp_index} {}", crc(context.as_bytes()))
        }
        D::X64VbsVpContext { vtl, registers, compatibility_mask } => {
            let names: Vec<u32> = registers
                .iter()
                .map(|r| r.into_vbs_vp_context_reg(*vtl).register_name.get())
                .collect();
            format!("VP_CONTEXT vbs {compatibility_mask} {} {names:?}", u8::from(*vtl))
        }
        D::AArch64VbsVpContext { vtl, registers, compatibility_mask } => {
            let names: Vec<u32> = registers
                .iter()
                .map(|r| r.into_vbs_vp_context_reg(*vtl).register_name.get())
                .collect();
            format!("VP_CONTEXT vbs {compatibility_mask} {} {names:?}", u8::from(*vtl))
        }
        D::ParameterInsert(p) => format!(
            "PARAMETER_INSERT {} {} {}",
            p.gpa, p.compatibility_mask, p.parameter_area_index
        ),
        D::ErrorRange { gpa, compatibility_mask, size_bytes } => {
            format!("ERROR_RANGE {gpa} {compatibility_mask} {size_bytes}")
        }
        D::SnpIdBlock { compatibility_mask, ld, guest_svn, .. } => {
            format!("SNP_ID_BLOCK {compatibility_mask} {} {guest_svn}", crc(ld))
        }
        D::VbsMeasurement { compatibility_mask, version, boot_measurement_digest, .. } => format!(
            "VBS_MEASUREMENT {compatibility_mask} {version} {}",
            crc(&boot_measurement_digest[..])
        ),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn crate_digest(file: &IgvmFile, kind: IgvmPlatformType, mask: u32) -> Option<String> {
    use igvm::measurement as m;
    match kind {
        IgvmPlatformType::SEV_SNP => {
            m::generate_snp_measurement(file.initializations(), file.directives(), mask).ok().map(|d| hex(&d))
        }
        IgvmPlatformType::TDX => m::generate_tdx_measurement(file.directives(), mask).ok().map(|d| hex(&d)),
        IgvmPlatformType::VSM_ISOLATION => {
            m::generate_vbs_measurement(file.directives(), mask).ok().map(|d| hex(&d))
        }
        _ => None,
    }
}

/// What igvmmeasure hashes of a file: on SEV and SEV-ES all data there is, on SEV-SNP a chain.
struct Igvmmeasure {
    snp: bool,
    stream: Sha256,
    chain: [u8; 48],
}

impl Igvmmeasure {
    fn page(&mut self, gpa: u64, page_type: u8, contents: Option<&[u8]>) {
        let digest = contents.map_or([0; 48], |page| <[u8; 48]>::from(Sha384::digest(page)));
        let mut info = Sha384::new();
        info.update(self.chain);
        info.update(digest);
        info.update(0x70u16.to_le_bytes());
        info.update([page_type, 0, 0, 0, 0, 0]);
        info.update(gpa.to_le_bytes());
        self.chain = info.finalize().into();
    }

    fn page_data(&mut self, gpa: u64, unmeasured: bool, data_type: IgvmPageDataType, data: &[u8]) {
        if !self.snp {
            return self.stream.update(data);
        }
        match data_type {
            IgvmPageDataType::NORMAL if unmeasured => self.page(gpa, 4, None),
            IgvmPageDataType::NORMAL if data.is_empty() => self.page(gpa, 1, Some(&[0; 4096])),
            IgvmPageDataType::NORMAL => self.page(gpa, 1, Some(data)),
            IgvmPageDataType::SECRETS => self.page(gpa, 5, None),
            _ => self.page(gpa, 6, None),
        }
    }
}

fn igvmmeasure(file: &IgvmFile, kind: IgvmPlatformType, wanted: u32) -> Option<String> {
    let snp = kind == IgvmPlatformType::SEV_SNP;
    if !snp && kind != IgvmPlatformType::SEV && kind != IgvmPlatformType::SEV_ES {
        return None;
    }
    let mut found = Igvmmeasure { snp, stream: Sha256::new(), chain: [0; 48] };
    for header in file.directives() {
        match header {
            D::PageData { gpa, compatibility_mask, flags, data_type, data } if compatibility_mask & wanted != 0 => {
                if flags.is_2mb_page() {
                    return None; // it refuses those whose data are 4 KiB
                }
                found.page_data(*gpa, flags.unmeasured(), *data_type, data);
            }
            D::ParameterInsert(p) if p.compatibility_mask & wanted != 0 => {
                found.page_data(p.gpa, true, IgvmPageDataType::NORMAL, &[]);
            }
            D::SnpVpContext { gpa, vmsa, .. } if snp => found.page(*gpa, 2, Some(vmsa.as_bytes())),
            D::SnpVpContext { vmsa, .. } => found.stream.update(vmsa.as_bytes()),
            _ => {}
        }
    }
    Some(if snp { hex(&found.chain) } else { hex(&found.stream.finalize()) })
}

fn digests(file: &IgvmFile) -> Vec<String> {
    let mut found = Vec::new();
    // the crate measures an area page by page, however large the file says it is
    let huge = |d: &D| match d {
        D::ParameterArea { number_of_bytes, .. } => *number_of_bytes > 1 << 24,
        D::ErrorRange { size_bytes, .. } => *size_bytes > 1 << 24,
        _ => false,
    };
    if file.directives().iter().any(huge) {
        return found;
    }
    for header in file.platforms() {
        let P::SupportedPlatform(p) = header;
        let (kind, mask) = (p.platform_type, p.compatibility_mask);
        for (source, compute) in [("crate", crate_digest as fn(&_, _, _) -> _), ("igvmmeasure", igvmmeasure)] {
            // measuring may panic where reading does not: the verdict stands, without that digest
            let digest = catch_unwind(AssertUnwindSafe(|| compute(file, kind, mask))).unwrap_or_default();
            if let Some(digest) = digest {
                found.push(format!("digest {source} {} {digest}", kind.0));
            }
        }
    }
    found
}

fn judge(data: &[u8]) -> String {
    match IgvmFile::new_from_binary(data, None) {
        Err(error) => format!("error\t{error:?}").replace('\n', " "),
        Ok(file) => {
            let mut lines: Vec<String> = file.platforms().iter().map(platform).collect();
            lines.extend(file.initializations().iter().map(initialization));
            lines.extend(file.directives().iter().map(directive));
            lines.extend(digests(&file));
            format!("ok\t{}", lines.join("\t"))
        }
    }
}

fn time(path: &str, count: usize, work: impl Fn(&IgvmFile)) {
    let data = std::fs::read(path).expect("readable file");
    for _ in 0..count {
        let start = std::time::Instant::now();
        let file = IgvmFile::new_from_binary(&data, None).expect("valid file");
        work(&file);
        println!("{}", start.elapsed().as_nanos());
        drop(file);
    }
}

fn measure(file: &IgvmFile) {
    for P::SupportedPlatform(p) in file.platforms() {
        if p.platform_type == IgvmPlatformType::SEV_SNP {
            std::hint::black_box(igvmmeasure(file, p.platform_type, p.compatibility_mask));
        }
    }
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    match words.get(1).map(String::as_str) {
        Some("--time") => return time(&words[2], words[3].parse().expect("a count"), |_| ()),
        Some("--time-measure") => return time(&words[2], words[3].parse().expect("a count"), measure),
        _ => (),
    }
    std::panic::set_hook(Box::new(|_| {}));
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let data = std::fs::read(line.expect("a path")).expect("readable file");
        let verdict = catch_unwind(|| judge(&data)).unwrap_or_else(|_| "panic".into());
        writeln!(out, "{verdict}").expect("standard output");
    }
}
