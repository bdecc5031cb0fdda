# debhelper's sequence `igvmfw`, for Build-Depends: dh-sequence-igvmfw or dh --with igvmfw
use warnings;
use strict;
use Debian::Debhelper::Dh_Lib;

# once all files are in their places, before their permissions are looked at
insert_before('dh_fixperms', 'dh_igvmfw');

1;
