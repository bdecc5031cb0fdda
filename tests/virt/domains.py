"""Domain XML for tests: libvirt's style, and everything a rewriter could lose."""

REQUEST = """\
<domain type='kvm'>
  <name>guest</name>
  <uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid>
  <memory unit='MiB'>512</memory>
  <vcpu>2</vcpu>
  <os firmware='igvm'>
    <type arch='x86_64' machine='q35'>hvm</type>
    <firmware>
      <feature enabled='yes' name='vtpm'/>
      <feature enabled='no' name='secure-boot'/>
    </firmware>
    <boot dev='hd'/>
  </os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
  </devices>
</domain>
"""

BY_PATH = """\
<domain type='kvm'>
  <name>guest</name>
  <memory unit='MiB'>512</memory>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <loader type='igvm'>/usr/share/igvm/ovmf.igvm</loader>
  </os>
</domain>
"""

SEV = """\
<domain type='kvm'>
  <name>guest</name>
  <memory unit='MiB'>512</memory>
  <vcpu>2</vcpu>
  <os firmware='igvm'>
    <type arch='x86_64' machine='q35'>hvm</type>
  </os>
  <launchSecurity type='sev'/>
</domain>
"""

EFI = """\
<domain type='kvm'>
  <name>guest</name>
  <memory unit='MiB'>512</memory>
  <os firmware='efi'>
    <type arch='x86_64' machine='q35'>hvm</type>
    <firmware>
      <feature enabled='no' name='secure-boot'/>
    </firmware>
    <loader readonly='yes' secure='no' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>
    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd' type='file'>
      <source file='/var/lib/libvirt/qemu/nvram/guest_VARS.fd'/>
    </nvram>
    <boot dev='hd'/>
  </os>
  <launchSecurity type='sev'>
    <cbitpos>47</cbitpos>
    <policy>0x03</policy>
  </launchSecurity>
</domain>
"""

# what a rewriter must not touch: comments in every place, CDATA, foreign namespaces, odd
# indentation, arguments of the user's own, unknown elements, instructions
CROWDED = """\
<?xml version='1.0' encoding='UTF-8'?>
<!-- before -->

<domain type='kvm' xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0' id='3'>
  <name>crowded</name><!-- beside -->
  <title>Töne &amp; &lt;mehr&gt;</title>
  <metadata>
    <app:app xmlns:app='http://example.com/app'><app:x>1</app:x></app:app>
    <other xmlns='http://example.com/other' note='&quot;quoted&quot; it&apos;s'/>
  </metadata>
    <memory unit='GiB'>1</memory>
  <unknown><![CDATA[a < b & c]]></unknown>
\t<vcpu placement='static' current='1'>2</vcpu>
  <os firmware='igvm'>
    <!-- first -->
    <type arch='x86_64' machine='pc-q35-10.1'>hvm</type>

    <firmware><!-- why --><feature enabled='yes' name='vtpm'/></firmware>
      <loader stateless='yes'/>   <bootmenu enable='yes'/>
    <?keep this?>
  </os>
  <memoryBacking>
    <hugepages/>
  </memoryBacking>
  <launchSecurity type='sev'>
    <cbitpos>47</cbitpos>
    <dhCert>AQAAAAAOAAA</dhCert>
  </launchSecurity>
  <q:commandline>
    <q:arg value='-L'/>
    <q:arg value='/usr/share/a,b'/>
    <q:env name='A' value='b'/>
  </q:commandline>
  <q:override><q:device alias='x'/></q:override>
</domain>
<!-- after -->
"""
