/* SPDX-License-Identifier: MIT
 *
 * The initial VMSA of a vCPU, as KVM makes it.
 *
 * Sources: layout, AMD64 Architecture Programmer's Manual volume 2, table B-4; contents, Linux
 * 6.14 arch/x86/kvm/svm/sev.c sev_es_sync_vmsa(), which starts from the VMCB that svm.c fills
 * (svm_set_segment, svm_set_cr0, svm_set_cr4, svm_set_efer, sev_post_set_cr3).
 */
#include "sevsim.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

#define CR0_NW_CD 0x60000000u
#define CR4_MCE 0x40u
#define DR7_FIXED_1 0x400u
#define EFER_SVME 0x1000u

#define MSR_SYSENTER_CS 0x174
#define MSR_SYSENTER_ESP 0x175
#define MSR_SYSENTER_EIP 0x176
#define MSR_DEBUGCTL 0x1d9
#define MSR_PAT 0x277
#define MSR_XSS 0xda0
#define MSR_STAR 0xc0000081
#define MSR_LSTAR 0xc0000082
#define MSR_CSTAR 0xc0000083
#define MSR_SFMASK 0xc0000084
#define MSR_KERNEL_GS_BASE 0xc0000102

/* offsets in the page; a segment is selector (2), attributes (2), limit (4), base (8) */
enum {
    ES = 0x000, CS = 0x010, SS = 0x020, DS = 0x030, FS = 0x040, GS = 0x050,
    GDTR = 0x060, LDTR = 0x070, IDTR = 0x080, TR = 0x090,
    CPL = 0x0cb, EFER = 0x0d0, XSS = 0x140, CR4 = 0x148, CR3 = 0x150, CR0 = 0x158,
    DR7 = 0x160, DR6 = 0x168, RFLAGS = 0x170, RIP = 0x178, RSP = 0x1d8, RAX = 0x1f8,
    STAR = 0x200, LSTAR = 0x208, CSTAR = 0x210, SFMASK = 0x218, KERNEL_GS_BASE = 0x220,
    SYSENTER_CS = 0x228, SYSENTER_ESP = 0x230, SYSENTER_EIP = 0x238, CR2 = 0x240,
    G_PAT = 0x268, DEBUGCTL = 0x270,
    RCX = 0x308, RDX = 0x310, RBX = 0x318, RBP = 0x328, RSI = 0x330, RDI = 0x338,
    R8 = 0x340, R9 = 0x348, R10 = 0x350, R11 = 0x358, R12 = 0x360, R13 = 0x368, R14 = 0x370,
    R15 = 0x378, SEV_FEATURES = 0x3b0, XCR0 = 0x3e8,
    X87_DP = 0x400, MXCSR = 0x408, X87_FTW = 0x40c, X87_FSW = 0x40e, X87_FCW = 0x410,
    X87_FOP = 0x412, X87_RIP = 0x418, FPREG_X87 = 0x420, FPREG_XMM = 0x470, FPREG_YMM = 0x570,
};

static const struct { const char *name; uint16_t offset; } segments[] = {
    {"es", ES}, {"cs", CS}, {"ss", SS}, {"ds", DS}, {"fs", FS}, {"gs", GS},
    {"gdtr", GDTR}, {"ldtr", LDTR}, {"idtr", IDTR}, {"tr", TR},
};

static const struct { const char *name; uint16_t offset, size; } registers[] = {
    {"cpl", CPL, 1}, {"efer", EFER, 8}, {"xss", XSS, 8}, {"cr4", CR4, 8}, {"cr3", CR3, 8},
    {"cr0", CR0, 8}, {"dr7", DR7, 8}, {"dr6", DR6, 8}, {"rflags", RFLAGS, 8}, {"rip", RIP, 8},
    {"rsp", RSP, 8}, {"rax", RAX, 8}, {"star", STAR, 8}, {"lstar", LSTAR, 8},
    {"cstar", CSTAR, 8}, {"sfmask", SFMASK, 8}, {"kernel_gs_base", KERNEL_GS_BASE, 8},
    {"sysenter_cs", SYSENTER_CS, 8}, {"sysenter_esp", SYSENTER_ESP, 8},
    {"sysenter_eip", SYSENTER_EIP, 8}, {"cr2", CR2, 8}, {"g_pat", G_PAT, 8},
    {"debugctl", DEBUGCTL, 8},
    {"rcx", RCX, 8}, {"rdx", RDX, 8}, {"rbx", RBX, 8}, {"rbp", RBP, 8}, {"rsi", RSI, 8},
    {"rdi", RDI, 8}, {"r8", R8, 8}, {"r9", R9, 8}, {"r10", R10, 8}, {"r11", R11, 8},
    {"r12", R12, 8}, {"r13", R13, 8}, {"r14", R14, 8}, {"r15", R15, 8},
    {"sev_features", SEV_FEATURES, 8}, {"xcr0", XCR0, 8}, {"mxcsr", MXCSR, 4},
    {"x87_fcw", X87_FCW, 2},
};

static void put(uint8_t *page, unsigned offset, uint64_t value, unsigned size)
{
    memcpy(page + offset, &value, size); /* x86: little-endian, as the page is */
}

static uint64_t get(const uint8_t *page, unsigned offset, unsigned size)
{
    uint64_t value = 0;

    memcpy(&value, page + offset, size);
    return value;
}

static void query(const struct vcpu *vcpu, unsigned long request, void *answer, const char *what)
{
    if (kvm_ioctl(vcpu->fd, request, answer) < 0)
        die("cannot read the %s of vCPU %u", what, vcpu->id);
}

static uint64_t read_msr(const struct vcpu *vcpu, uint32_t index)
{
    struct { struct kvm_msrs head; struct kvm_msr_entry entry; } msr = {
        .head.nmsrs = 1, .entry.index = index,
    };

    /* 1 when read; an MSR the host's KVM does not have is one QEMU cannot have set */
    return kvm_ioctl(vcpu->fd, KVM_GET_MSRS, &msr) == 1 ? msr.entry.data : 0;
}

static void put_segment(uint8_t *page, unsigned offset, const struct kvm_segment *segment)
{
    bool present = segment->present && !segment->unusable;
    unsigned attributes = (segment->type & 15) | (segment->s & 1) << 4 | (segment->dpl & 3) << 5 |
                          present << 7 | (segment->avl & 1) << 8 | (segment->l & 1) << 9 |
                          (segment->db & 1) << 10 | (segment->g & 1) << 11;

    put(page, offset, segment->selector, 2);
    put(page, offset + 2, attributes, 2);
    put(page, offset + 4, segment->limit, 4);
    put(page, offset + 8, segment->base, 8);
}

static void put_table(uint8_t *page, unsigned offset, const struct kvm_dtable *table)
{
    put(page, offset + 4, table->limit, 4);
    put(page, offset + 8, table->base, 8);
}

static void put_system_registers(uint8_t *page, const struct vcpu *vcpu)
{
    struct kvm_sregs sregs = vcpu->sregs;

    if (!vcpu->sregs_known)
        query(vcpu, KVM_GET_SREGS, &sregs, "system registers");
    put_segment(page, ES, &sregs.es);
    put_segment(page, CS, &sregs.cs);
    put_segment(page, SS, &sregs.ss);
    put_segment(page, DS, &sregs.ds);
    put_segment(page, FS, &sregs.fs);
    put_segment(page, GS, &sregs.gs);
    put_segment(page, LDTR, &sregs.ldt);
    put_segment(page, TR, &sregs.tr);
    put_table(page, GDTR, &sregs.gdt);
    put_table(page, IDTR, &sregs.idt);
    put(page, CPL, sregs.ss.dpl & 3, 1);
    put(page, EFER, sregs.efer | EFER_SVME, 8);
    /* KVM_X86_QUIRK_CD_NW_CLEARED, on unless userspace turns it off, which QEMU does not */
    put(page, CR0, sregs.cr0 & ~(uint64_t)CR0_NW_CD, 8);
    put(page, CR3, sregs.cr3, 8);
    put(page, CR4, sregs.cr4 | CR4_MCE, 8); /* the host's own bit, set on every Linux host */
}

static void put_general_registers(uint8_t *page, const struct vcpu *vcpu)
{
    struct kvm_regs regs;

    query(vcpu, KVM_GET_REGS, &regs, "general registers");
    put(page, RAX, regs.rax, 8);
    put(page, RBX, regs.rbx, 8);
    put(page, RCX, regs.rcx, 8);
    put(page, RDX, regs.rdx, 8);
    put(page, RSI, regs.rsi, 8);
    put(page, RDI, regs.rdi, 8);
    put(page, RBP, regs.rbp, 8);
    put(page, RSP, regs.rsp, 8);
    put(page, R8, regs.r8, 8);
    put(page, R9, regs.r9, 8);
    put(page, R10, regs.r10, 8);
    put(page, R11, regs.r11, 8);
    put(page, R12, regs.r12, 8);
    put(page, R13, regs.r13, 8);
    put(page, R14, regs.r14, 8);
    put(page, R15, regs.r15, 8);
    put(page, RIP, regs.rip, 8);
    put(page, RFLAGS, regs.rflags, 8);
}

static void put_msrs(uint8_t *page, const struct vcpu *vcpu)
{
    put(page, STAR, read_msr(vcpu, MSR_STAR), 8);
    put(page, LSTAR, read_msr(vcpu, MSR_LSTAR), 8);
    put(page, CSTAR, read_msr(vcpu, MSR_CSTAR), 8);
    put(page, SFMASK, read_msr(vcpu, MSR_SFMASK), 8);
    put(page, KERNEL_GS_BASE, read_msr(vcpu, MSR_KERNEL_GS_BASE), 8);
    put(page, SYSENTER_CS, read_msr(vcpu, MSR_SYSENTER_CS), 8);
    put(page, SYSENTER_ESP, read_msr(vcpu, MSR_SYSENTER_ESP), 8);
    put(page, SYSENTER_EIP, read_msr(vcpu, MSR_SYSENTER_EIP), 8);
    put(page, G_PAT, read_msr(vcpu, MSR_PAT), 8);
    put(page, DEBUGCTL, read_msr(vcpu, MSR_DEBUGCTL), 8);
    put(page, XSS, read_msr(vcpu, MSR_XSS), 8);
}

static uint64_t read_xcr0(const struct vcpu *vcpu)
{
    struct kvm_xcrs xcrs;

    query(vcpu, KVM_GET_XCRS, &xcrs, "extended control registers");
    for (unsigned i = 0; i < xcrs.nr_xcrs && i < KVM_MAX_XCRS; i++)
        if (xcrs.xcrs[i].xcr == 0)
            return xcrs.xcrs[i].value;
    return 1;
}

/* The standard (not compacted) XSAVE format: the FXSAVE image, the header at 512, YMM at 576. */
static void put_fpu(uint8_t *page, const struct vcpu *vcpu)
{
    struct kvm_xsave xsave;
    const uint8_t *image = (const uint8_t *)xsave.region;

    query(vcpu, KVM_GET_XSAVE, &xsave, "floating-point state");
    memcpy(page + X87_FCW, image + 0, 2);
    memcpy(page + X87_FSW, image + 2, 2);
    memcpy(page + X87_FTW, image + 4, 2);
    memcpy(page + X87_FOP, image + 6, 2);
    memcpy(page + X87_RIP, image + 8, 8);
    memcpy(page + X87_DP, image + 16, 8);
    memcpy(page + MXCSR, image + 24, 4);
    for (unsigned i = 0; i < 8; i++) { /* eight low halves, then the eight 16-bit high parts */
        memcpy(page + FPREG_X87 + i * 8, image + 32 + i * 16, 8);
        memcpy(page + FPREG_X87 + 64 + i * 2, image + 32 + i * 16 + 8, 2);
    }
    memcpy(page + FPREG_XMM, image + 160, 256);
    memcpy(page + FPREG_YMM, image + 576, 256);
}

bool vmsa_build(const struct vcpu *vcpu, uint64_t sev_features, bool with_fpu,
                uint8_t page[PAGE_SIZE])
{
    struct kvm_debugregs debug;

    memset(page, 0, PAGE_SIZE);
    query(vcpu, KVM_GET_DEBUGREGS, &debug, "debug registers");
    if (debug.dr7 & ~(uint64_t)DR7_FIXED_1)
        return false;
    put_system_registers(page, vcpu);
    put_general_registers(page, vcpu);
    put_msrs(page, vcpu);
    put(page, DR6, debug.dr6, 8);
    put(page, DR7, debug.dr7 | DR7_FIXED_1, 8);
    put(page, XCR0, read_xcr0(vcpu), 8);
    put(page, SEV_FEATURES, sev_features, 8);
    if (with_fpu)
        put_fpu(page, vcpu);
    return true;
}

void vmsa_each(const uint8_t page[PAGE_SIZE],
               void (*each)(const char *name, uint64_t value, void *context), void *context)
{
    static const struct { const char *name; unsigned offset, size; } parts[] = {
        {"selector", 0, 2}, {"attrib", 2, 2}, {"limit", 4, 4}, {"base", 8, 8},
    };
    char name[32];

    for (size_t i = 0; i < sizeof segments / sizeof *segments; i++)
        for (size_t k = 0; k < sizeof parts / sizeof *parts; k++) {
            snprintf(name, sizeof name, "%s.%s", segments[i].name, parts[k].name);
            each(name, get(page, segments[i].offset + parts[k].offset, parts[k].size), context);
        }
    for (size_t i = 0; i < sizeof registers / sizeof *registers; i++)
        each(registers[i].name, get(page, registers[i].offset, registers[i].size), context);
}
