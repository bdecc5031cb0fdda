/* SPDX-License-Identifier: MIT
 *
 * Takes the system calls through which QEMU sees the host: opening /dev/sev, and ioctl().
 * What concerns SEV is answered here or in launch.c, everything else goes to the kernel.
 */
#define _GNU_SOURCE
#include "sevsim.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/psp-sev.h>
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MAX_SLOTS 4096

/* of <linux/kvm.h> and <asm/kvm.h> of Linux 6.11; older headers lack them */
#define CAP_EXIT_HYPERCALL 201
#define CAP_USER_MEMORY2 231
#define CAP_MEMORY_ATTRIBUTES 233
#define CAP_GUEST_MEMFD 234
#define CAP_VM_TYPES 235
#define HYPERCALL_MAP_GPA_RANGE 12
#define MEMORY_ATTRIBUTE_PRIVATE 8
#define MEM_GUEST_MEMFD 4u
#define GROUP_SEV 1
#define SEV_VMSA_FEATURES 0
#define SVM_DEBUG_SWAP 0x20 /* the one sev_features bit that Linux 6.14 offers */

struct memory_region2 {
    uint32_t slot, flags;
    uint64_t guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset;
    uint32_t guest_memfd, pad1;
    uint64_t pad2[14];
};

struct create_guest_memfd { uint64_t size, flags, reserved[6]; };

#define SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct memory_region2)
#define SET_SREGS2 _IOC(_IOC_WRITE, KVMIO, 0xcd, 0x140)
#define SET_MEMORY_ATTRIBUTES _IOC(_IOC_WRITE, KVMIO, 0xd2, 0x20)
#define CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct create_guest_memfd)

struct vcpu vcpus[MAX_VCPUS];
unsigned vcpu_count;
enum vm_type vm_type;

static struct kvm_userspace_memory_region slots[MAX_SLOTS]; /* memory_size 0: free */
static int kvm_fd = -1, sev_fd = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void die(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    fputs("sevsim: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    _exit(70);
}

/* The function of the C library that one of ours stands before. */
static void *next(const char *name)
{
    void *function = dlsym(RTLD_NEXT, name);

    if (!function)
        die("the C library has no %s", name);
    return function;
}

int kvm_ioctl(int fd, unsigned long request, void *argument)
{
    static int (*real)(int, unsigned long, ...);

    if (!real)
        real = next("ioctl");
    return real(fd, request, argument);
}

/* ---- /dev/sev ---- */

static int open_sev(const char *path)
{
    int fd = strcmp(path, "/dev/sev") == 0 ? memfd_create("sev", MFD_CLOEXEC) : -1;

    if (fd >= 0) {
        pthread_mutex_lock(&lock);
        sev_fd = fd;
        pthread_mutex_unlock(&lock);
    }
    return fd;
}

int open(const char *path, int flags, ...)
{
    static int (*real)(const char *, int, ...);
    mode_t mode = 0;
    int fd = open_sev(path);

    if (fd >= 0)
        return fd;
    if (__OPEN_NEEDS_MODE(flags)) {
        va_list arguments;

        va_start(arguments, flags);
        mode = va_arg(arguments, mode_t);
        va_end(arguments);
    }
    if (!real)
        real = next("open");
    return real(path, flags, mode);
}

int open64(const char *path, int flags, ...) __attribute__((alias("open"))); /* x86-64: the same */

/* Fills a caller's buffer, or tells the length it has to have. */
static int answer(struct sev_issue_cmd *command, uint64_t address, uint32_t *length,
                  uint32_t needed, uint8_t filling)
{
    bool fits = *length >= needed;

    *length = needed;
    if (!fits) {
        command->error = SEV_RET_INVALID_LEN;
        errno = EIO;
        return -1;
    }
    memset((void *)(uintptr_t)address, filling, needed);
    return 0;
}

static int platform_command(struct sev_issue_cmd *command)
{
    void *argument = (void *)(uintptr_t)command->data;

    command->error = 0;
    switch (command->cmd) {
    case SEV_PLATFORM_STATUS:
        *(struct sev_user_data_status *)argument = (struct sev_user_data_status){
            .api_major = API_MAJOR, .api_minor = API_MINOR, .build = API_BUILD,
            .state = 1, .flags = SEV_STATUS_FLAGS_CONFIG_ES,
        };
        return 0;
    case SEV_PDH_CERT_EXPORT: { /* no real certificates: nobody here follows the chain */
        struct sev_user_data_pdh_cert_export *export = argument;
        uint32_t pdh = export->pdh_cert_len, chain = export->cert_chain_len;
        int result = answer(command, export->pdh_cert_address, &pdh, 2084, 0x11) |
                     answer(command, export->cert_chain_address, &chain, 6000, 0x22);

        export->pdh_cert_len = pdh;
        export->cert_chain_len = chain;
        return result;
    }
    case SEV_GET_ID2: {
        struct sev_user_data_get_id2 *id = argument;
        uint32_t length = id->length;
        int result = answer(command, id->address, &length, 64, 0x33);

        id->length = length;
        return result;
    }
    default:
        errno = EINVAL;
        return -1;
    }
}

/* ---- the virtual machine ---- */

bool gpa_of(uint64_t uaddr, uint64_t *gpa)
{
    for (unsigned i = 0; i < MAX_SLOTS; i++)
        if (uaddr >= slots[i].userspace_addr &&
            uaddr - slots[i].userspace_addr < slots[i].memory_size) {
            *gpa = slots[i].guest_phys_addr + (uaddr - slots[i].userspace_addr);
            return true;
        }
    return false;
}

static void remember_slot(const struct kvm_userspace_memory_region *region)
{
    if (region->slot >> 16) /* another address space: SMM's view of the same memory */
        return;
    if (region->slot >= MAX_SLOTS)
        die("memory slot %u, at most %u are expected", region->slot, MAX_SLOTS);
    slots[region->slot] = *region;
}

static struct vcpu *vcpu_of(int fd)
{
    for (unsigned i = 0; i < vcpu_count; i++)
        if (vcpus[i].fd == fd)
            return &vcpus[i];
    return NULL;
}

static void remember_vcpu(int fd, unsigned id)
{
    if (vcpu_count == MAX_VCPUS)
        die("more than %u vCPUs", MAX_VCPUS);
    vcpus[vcpu_count++] = (struct vcpu){ .fd = fd, .id = id };
}

/* kvm_sregs and kvm_sregs2 agree up to the interrupt bitmap */
static void remember_sregs(int fd, const void *sregs)
{
    struct vcpu *vcpu = vcpu_of(fd);

    if (!vcpu)
        return;
    memcpy(&vcpu->sregs, sregs, offsetof(struct kvm_sregs, interrupt_bitmap));
    vcpu->sregs_known = true;
}

static int set_memory_region(int fd, const struct memory_region2 *wanted)
{
    /* guest_memfd would make the memory private; here the mapping that QEMU keeps is the memory */
    struct kvm_userspace_memory_region region = {
        wanted->slot, wanted->flags & ~MEM_GUEST_MEMFD, wanted->guest_phys_addr,
        wanted->memory_size, wanted->userspace_addr,
    };
    int result = kvm_ioctl(fd, KVM_SET_USER_MEMORY_REGION, &region);

    if (result >= 0)
        remember_slot(&region);
    return result;
}

static int create_guest_memfd(const struct create_guest_memfd *wanted)
{
    int fd = memfd_create("guest", MFD_CLOEXEC);

    if (fd >= 0 && ftruncate(fd, (off_t)wanted->size) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

static int check_extension(int fd, void *argument)
{
    switch ((uintptr_t)argument) {
    case CAP_VM_TYPES: return 1 << VM_DEFAULT | 1 << VM_SEV | 1 << VM_SEV_ES | 1 << VM_SNP;
    case CAP_MEMORY_ATTRIBUTES: return MEMORY_ATTRIBUTE_PRIVATE;
    case CAP_GUEST_MEMFD:
    case CAP_USER_MEMORY2: return 1;
    case CAP_EXIT_HYPERCALL: return 1 << HYPERCALL_MAP_GPA_RANGE;
    default: return kvm_ioctl(fd, KVM_CHECK_EXTENSION, argument);
    }
}

static int get_device_attribute(int fd, struct kvm_device_attr *attribute)
{
    if (fd != kvm_fd || attribute->group != GROUP_SEV || attribute->attr != SEV_VMSA_FEATURES)
        return kvm_ioctl(fd, KVM_GET_DEVICE_ATTR, attribute);
    *(uint64_t *)(uintptr_t)attribute->addr = SVM_DEBUG_SWAP;
    return 0;
}

/* A vCPU of a launched guest: encrypted code cannot run here, so it only waits.  Each return lets
 * QEMU look for work, as an interrupted KVM_RUN does. */
static int stand_still(void)
{
    nanosleep(&(struct timespec){ .tv_nsec = 50 * 1000 * 1000 }, NULL);
    errno = EINTR;
    return -1;
}

/* Every request but KVM_RUN, under the lock. */
static int vm_request(int fd, unsigned long request, void *argument)
{
    int result;

    switch (request) {
    case KVM_CHECK_EXTENSION:
        return check_extension(fd, argument);
    case KVM_GET_DEVICE_ATTR:
        return get_device_attribute(fd, argument);
    case KVM_CREATE_VM:
        kvm_fd = fd;
        vm_type = (enum vm_type)(uintptr_t)argument;
        return kvm_ioctl(fd, KVM_CREATE_VM, (void *)VM_DEFAULT);
    case KVM_CREATE_VCPU:
        result = kvm_ioctl(fd, request, argument);
        if (result >= 0)
            remember_vcpu(result, (unsigned)(uintptr_t)argument);
        return result;
    case KVM_SET_SREGS:
    case SET_SREGS2:
        result = kvm_ioctl(fd, request, argument);
        if (result >= 0)
            remember_sregs(fd, argument);
        return result;
    case KVM_SET_USER_MEMORY_REGION:
        result = kvm_ioctl(fd, request, argument);
        if (result >= 0)
            remember_slot(argument);
        return result;
    case SET_USER_MEMORY_REGION2:
        return set_memory_region(fd, argument);
    case CREATE_GUEST_MEMFD:
        return create_guest_memfd(argument);
    case SET_MEMORY_ATTRIBUTES:
    case KVM_MEMORY_ENCRYPT_REG_REGION:
    case KVM_MEMORY_ENCRYPT_UNREG_REGION:
        return 0;
    case KVM_MEMORY_ENCRYPT_OP: /* without an argument it asks whether SEV is there */
        return argument ? launch_command(argument) : 0;
    case KVM_ENABLE_CAP:
        if (((struct kvm_enable_cap *)argument)->cap == CAP_EXIT_HYPERCALL)
            return 0;
        break;
    }
    return kvm_ioctl(fd, request, argument);
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    void *argument;
    int result;

    va_start(arguments, request);
    argument = va_arg(arguments, void *);
    va_end(arguments);
    request &= 0xffffffff; /* callers that hold it in an int have it sign-extended */

    if (request == KVM_RUN)
        return launch_begun() ? stand_still() : kvm_ioctl(fd, request, argument);
    if (request != SEV_ISSUE_CMD && _IOC_TYPE(request) != KVMIO)
        return kvm_ioctl(fd, request, argument);
    pthread_mutex_lock(&lock);
    if (request == SEV_ISSUE_CMD && fd == sev_fd)
        result = platform_command(argument);
    else
        result = vm_request(fd, request, argument);
    pthread_mutex_unlock(&lock);
    return result;
}
