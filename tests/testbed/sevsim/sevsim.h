/* SPDX-License-Identifier: MIT
 *
 * A stand-in for an AMD SEV host.  Preloaded into QEMU on a machine that has KVM but no SEV, it
 * answers /dev/sev and KVM's SEV commands for SEV, SEV-ES and SEV-SNP, computes the launch digest
 * from what QEMU hands over, as the AMD secure processor would, and records the launch.
 *
 * The guest itself does not run: its memory is not encrypted, so its vCPUs stand still once the
 * launch is over.
 *
 * Environment:
 *   SEVSIM_RECORD  directory, must exist; each launch writes launch.jsonl (one command a line),
 *                  data.bin (the bytes of every LAUNCH_UPDATE, in order) and vmsa.bin (each
 *                  vCPU's VMSA page, in the order measured), replacing those of the one before
 *   SEVSIM_TIK     32 hex digits: the transport integrity key that signs the measurement of
 *                  SEV and SEV-ES; zeros when unset
 *
 * Files: interpose.c takes QEMU's system calls, launch.c is the firmware's side, vmsa.c is what
 * KVM makes of a vCPU's registers.
 */
#ifndef SEVSIM_H
#define SEVSIM_H

#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>

#define PAGE_SIZE 4096
#define MAX_VCPUS 1024

/* What the stand-in's firmware says of itself (PLATFORM_STATUS); the measurement covers it. */
#define API_MAJOR 1
#define API_MINOR 55
#define API_BUILD 21

/* VM types of KVM_CREATE_VM (asm/kvm.h of Linux 6.11; older headers lack them) */
enum vm_type { VM_DEFAULT = 0, VM_SEV = 2, VM_SEV_ES = 3, VM_SNP = 4 };

struct vcpu {
    int fd;
    unsigned id;
    /* What QEMU last gave KVM_SET_SREGS.  KVM_GET_SREGS would not do: it derives the granularity
     * bit from the limit and forces type bits, where the VMSA holds what was set. */
    struct kvm_sregs sregs;
    bool sregs_known;
};

/* interpose.c: the virtual machine as QEMU built it. All of it is under one lock. */
extern struct vcpu vcpus[MAX_VCPUS];
extern unsigned vcpu_count;
extern enum vm_type vm_type;
int kvm_ioctl(int fd, unsigned long request, void *argument); /* the real one */
bool gpa_of(uint64_t uaddr, uint64_t *gpa);
_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* launch.c: one KVM_MEMORY_ENCRYPT_OP; 0, or -1 with errno and command->error as KVM sets them */
int launch_command(struct kvm_sev_cmd *command);
bool launch_begun(void);

/* vmsa.c: the page KVM would encrypt for a vCPU; false when KVM would refuse its state */
bool vmsa_build(const struct vcpu *vcpu, uint64_t sev_features, bool with_fpu,
                uint8_t page[PAGE_SIZE]);
/* Calls back with each register of a page, segments as NAME.selector, .attrib, .limit, .base. */
void vmsa_each(const uint8_t page[PAGE_SIZE],
               void (*each)(const char *name, uint64_t value, void *context), void *context);

#endif
