/* SPDX-License-Identifier: MIT
 *
 * The firmware's side of a launch: the commands of KVM_MEMORY_ENCRYPT_OP, the launch digest they
 * build up, and the record of both.
 *
 * Sources: commands and structures, Linux 6.14 Documentation/virt/kvm/x86/amd-memory-encryption.rst
 * and arch/x86/kvm/svm/sev.c; the digest and the measurement of SEV and SEV-ES, AMD's SEV API
 * 0.24 (publication 55766), LAUNCH_UPDATE_DATA, LAUNCH_UPDATE_VMSA, LAUNCH_MEASURE; those of
 * SEV-SNP, SEV-SNP Firmware ABI 1.55 (56860), sections 8.17.2 and 8.18.
 */
#include "sevsim.h"

#include <errno.h>
#include <linux/psp-sev.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define POLICY_ES 0x4u             /* SEV: bit 2 */
#define SNP_POLICY_MUST_BE_ONE 17  /* bit number */
#define SNP_ACTIVE 1u              /* in a VMSA's sev_features */
#define SNP_VMSA_GPA 0xfffffffff000u
#define ID_BLOCK_SIZE 96
#define ID_AUTH_SIZE 4096

/* kvm_sev_cmd.id; enum sev_cmd_id of older headers ends before SEV-SNP */
enum {
    CMD_INIT = 0, CMD_ES_INIT = 1, CMD_LAUNCH_START = 2, CMD_LAUNCH_UPDATE_DATA = 3,
    CMD_LAUNCH_UPDATE_VMSA = 4, CMD_LAUNCH_MEASURE = 6, CMD_LAUNCH_FINISH = 7, CMD_INIT2 = 22,
    CMD_SNP_LAUNCH_START = 100, CMD_SNP_LAUNCH_UPDATE = 101, CMD_SNP_LAUNCH_FINISH = 102,
};

enum { PAGE_NORMAL = 1, PAGE_VMSA = 2, PAGE_ZERO = 3, PAGE_UNMEASURED = 4, PAGE_SECRETS = 5,
       PAGE_CPUID = 6 };

struct init2 { uint64_t vmsa_features; uint32_t flags; uint16_t ghcb_version; };

struct snp_start { uint64_t policy; uint8_t gosvw[16]; uint16_t flags; };

struct snp_update { uint64_t gfn, uaddr, len; uint8_t type, pad; uint16_t flags; };

struct snp_finish {
    uint64_t id_block, id_auth;
    uint8_t id_block_en, auth_key_en, vcek_disabled, host_data[32];
};

/* A guest's states, as the firmware keeps them; a command in the wrong one is refused. */
static enum { NONE, INITIALIZED, LAUNCHING, MEASURED, RUNNING } state;
static bool with_fpu;          /* VM types measure the FPU's registers, KVM_SEV_ES_INIT does not */
static uint64_t sev_features;
static uint64_t policy;
static EVP_MD_CTX *sev_digest; /* SEV, SEV-ES: all data, then all VMSAs */
static uint8_t snp_digest[48]; /* SEV-SNP: the chain of PAGE_INFO structures */

static FILE *record, *data, *vmsas;

/* ---- the record ---- */

static FILE *open_record(const char *name)
{
    const char *directory = getenv("SEVSIM_RECORD");
    char path[4096];
    FILE *file;

    if (!directory)
        die("SEVSIM_RECORD is not set");
    snprintf(path, sizeof path, "%s/%s", directory, name);
    file = fopen(path, "we");
    if (!file)
        die("cannot write %s: %s", path, strerror(errno));
    return file;
}

static void record_hex(const char *name, const void *bytes, size_t length)
{
    fprintf(record, ",\"%s\":\"", name);
    for (size_t i = 0; i < length; i++)
        fprintf(record, "%02x", ((const uint8_t *)bytes)[i]);
    fputc('"', record);
}

static void record_number(const char *name, uint64_t value)
{
    fprintf(record, ",\"%s\":%llu", name, (unsigned long long)value);
}

static void record_begin(const char *op)
{
    fprintf(record, "{\"op\":\"%s\"", op);
}

static void record_end(void)
{
    fputs("}\n", record);
    /* the line last: who reads it finds what it speaks of */
    if (fflush(data) || fflush(vmsas) || fflush(record) || ferror(record))
        die("cannot write the record: %s", strerror(errno));
}

static void record_register(const char *name, uint64_t value, void *first)
{
    fprintf(record, "%s\"%s\":%llu", *(bool *)first ? "" : ",", name, (unsigned long long)value);
    *(bool *)first = false;
}

static void record_vmsa(const struct vcpu *vcpu, const uint8_t page[PAGE_SIZE])
{
    bool first = true;

    fwrite(page, 1, PAGE_SIZE, vmsas);
    record_begin("vmsa");
    record_number("vcpu", vcpu->id);
    fputs(",\"registers\":{", record);
    vmsa_each(page, record_register, &first);
    fputc('}', record);
    record_end();
}

/* ---- digests ---- */

static void hash(const EVP_MD *algorithm, const void *bytes, size_t length, uint8_t *digest)
{
    if (!EVP_Digest(bytes, length, digest, NULL, algorithm, NULL))
        die("libcrypto cannot hash");
}

static void sev_extend(const void *bytes, size_t length)
{
    if (!EVP_DigestUpdate(sev_digest, bytes, length))
        die("libcrypto cannot hash");
}

static void sev_current(uint8_t digest[32])
{
    EVP_MD_CTX *copy = EVP_MD_CTX_new();

    if (!copy || !EVP_MD_CTX_copy_ex(copy, sev_digest) || !EVP_DigestFinal_ex(copy, digest, NULL))
        die("libcrypto cannot hash");
    EVP_MD_CTX_free(copy);
}

/* One PAGE_INFO of the chain; contents is the page's SHA-384, NULL where none is measured. */
static void snp_extend(uint64_t gpa, uint8_t type, const uint8_t *contents)
{
    struct {
        uint8_t digest[48], contents[48];
        uint16_t length;
        uint8_t page_type, imi_page, vmpl3, vmpl2, vmpl1, reserved;
        uint64_t gpa;
    } info = { .length = sizeof info, .page_type = type, .gpa = gpa };

    _Static_assert(sizeof info == 0x70, "PAGE_INFO is 112 bytes");
    memcpy(info.digest, snp_digest, sizeof snp_digest);
    if (contents)
        memcpy(info.contents, contents, sizeof info.contents);
    hash(EVP_sha384(), &info, sizeof info, snp_digest);
}

static void transport_integrity_key(uint8_t key[16])
{
    const char *hex = getenv("SEVSIM_TIK");

    memset(key, 0, 16);
    if (!hex)
        return;
    if (strlen(hex) != 32)
        die("SEVSIM_TIK is not 32 hex digits");
    for (unsigned i = 0; i < 16; i++)
        if (sscanf(hex + 2 * i, "%2hhx", &key[i]) != 1)
            die("SEVSIM_TIK is not 32 hex digits");
}

/* HMAC(TIK, 0x04 || API version || policy || digest || nonce) || nonce */
static void sev_measurement(const uint8_t digest[32], uint8_t blob[48])
{
    uint8_t key[16], message[4 + 4 + 32 + 16] = { 0x04, API_MAJOR, API_MINOR, API_BUILD };
    uint32_t policy32 = policy;
    uint8_t *nonce = blob + 32;

    if (RAND_bytes(nonce, 16) != 1)
        die("libcrypto has no random bytes");
    memcpy(message + 4, &policy32, 4);
    memcpy(message + 8, digest, 32);
    memcpy(message + 40, nonce, 16);
    transport_integrity_key(key);
    if (!HMAC(EVP_sha256(), key, sizeof key, message, sizeof message, blob, NULL))
        die("libcrypto cannot sign");
}

/* ---- commands ---- */

/* The firmware refuses: EIO, with its own status beside it. */
static int refuse(struct kvm_sev_cmd *command, uint32_t status)
{
    command->error = status;
    errno = EIO;
    return -1;
}

static int invalid(void) /* KVM itself refuses */
{
    errno = EINVAL;
    return -1;
}

static int init(const char *op, const struct init2 *init2)
{
    if (state != NONE || vcpu_count || (init2 && (init2->flags || vm_type == VM_DEFAULT)))
        return invalid();
    record = open_record("launch.jsonl");
    data = open_record("data.bin");
    vmsas = open_record("vmsa.bin");
    sev_digest = EVP_MD_CTX_new();
    if (!sev_digest || !EVP_DigestInit_ex(sev_digest, EVP_sha256(), NULL))
        die("libcrypto cannot hash");
    with_fpu = init2;
    sev_features = (init2 ? init2->vmsa_features : 0) | (vm_type == VM_SNP ? SNP_ACTIVE : 0);
    state = INITIALIZED;
    record_begin(op);
    record_number("vm_type", vm_type);
    record_number("sev_features", sev_features);
    record_end();
    return 0;
}

static int launch_start(struct kvm_sev_cmd *command, struct kvm_sev_launch_start *start)
{
    if (state != INITIALIZED)
        return refuse(command, SEV_RET_INVALID_GUEST_STATE);
    policy = start->policy;
    start->handle = 1;
    state = LAUNCHING;
    record_begin("start");
    record_number("policy", policy);
    record_end();
    return 0;
}

/* The bytes of one update, and where in the guest they lie if that is known. */
static void record_update(const char *op, const void *bytes, uint64_t length, const uint64_t *gpa)
{
    uint8_t digest[32];

    fwrite(bytes, 1, length, data);
    hash(EVP_sha256(), bytes, length, digest);
    record_begin(op);
    if (gpa)
        record_number("gpa", *gpa);
    record_number("len", length);
    record_hex("sha256", digest, sizeof digest);
}

static int launch_update_data(struct kvm_sev_cmd *command,
                              const struct kvm_sev_launch_update_data *update)
{
    const void *bytes = (const void *)(uintptr_t)update->uaddr;
    uint64_t gpa;
    bool known = gpa_of(update->uaddr, &gpa);

    if (state != LAUNCHING)
        return refuse(command, SEV_RET_INVALID_GUEST_STATE);
    if (!update->len || update->len % 16)
        return refuse(command, SEV_RET_INVALID_LEN);
    sev_extend(bytes, update->len);
    record_update("update_data", bytes, update->len, known ? &gpa : NULL);
    record_end();
    return 0;
}

/* Calls back with the VMSA of each vCPU in the order KVM measures them: the boot vCPU first. */
static int each_vmsa(void (*measure)(const uint8_t page[PAGE_SIZE]))
{
    uint8_t page[PAGE_SIZE];

    for (unsigned boot = 1; boot <= 2; boot++)
        for (unsigned i = 0; i < vcpu_count; i++) {
            if ((vcpus[i].id == 0) != (boot == 1))
                continue;
            if (!vmsa_build(&vcpus[i], sev_features, with_fpu, page))
                return invalid();
            measure(page);
            record_vmsa(&vcpus[i], page);
        }
    return 0;
}

static void sev_measure_vmsa(const uint8_t page[PAGE_SIZE])
{
    sev_extend(page, PAGE_SIZE);
}

static int launch_update_vmsa(struct kvm_sev_cmd *command)
{
    if (!(policy & POLICY_ES))
        return invalid();
    if (state != LAUNCHING)
        return refuse(command, SEV_RET_INVALID_GUEST_STATE);
    record_begin("update_vmsa");
    record_number("vcpus", vcpu_count);
    record_end();
    return each_vmsa(sev_measure_vmsa);
}

static int launch_measure(struct kvm_sev_cmd *command, struct kvm_sev_launch_measure *measure)
{
    uint8_t digest[32], blob[48];

    if (state != LAUNCHING)
        return refuse(command, SEV_RET_INVALID_GUEST_STATE);
    if (measure->len < sizeof blob) { /* how QEMU asks for the length */
        measure->len = sizeof blob;
        return refuse(command, SEV_RET_INVALID_LEN);
    }
    sev_current(digest);
    sev_measurement(digest, blob);
    memcpy((void *)(uintptr_t)measure->uaddr, blob, sizeof blob);
    measure->len = sizeof blob;
    state = MEASURED;
    record_begin("measure");
    record_hex("digest", digest, sizeof digest);
    record_hex("measurement", blob, sizeof blob);
    record_end();
    return 0;
}

static int launch_finish(struct kvm_sev_cmd *command)
{
    if (state != MEASURED)
        return refuse(command, SEV_RET_INVALID_GUEST_STATE);
    state = RUNNING;
    record_begin("finish");
    record_end();
    return 0;
}

static int snp_launch_start(struct kvm_sev_cmd *command, const struct snp_start *start)
{
    if (!(start->policy >> SNP_POLICY_MUST_BE_ONE & 1) || start->flags)
        return invalid();
    if (state != INITIALIZED)
        return refuse(command, SEV_RET_INVALID_GUEST_STATE);
    policy = start->policy;
    state = LAUNCHING;
    record_begin("snp_start");
    record_number("policy", policy);
    record_end();
    return 0;
}

static int snp_launch_update(struct kvm_sev_cmd *command, struct snp_update *update)
{
    uint64_t gpa = update->gfn * PAGE_SIZE;
    const uint8_t *bytes = (const uint8_t *)(uintptr_t)update->uaddr;
    uint8_t contents[48];

    if (!update->len || update->len % PAGE_SIZE || update->flags ||
        (update->type != PAGE_NORMAL && update->type != PAGE_ZERO &&
         update->type != PAGE_UNMEASURED && update->type != PAGE_SECRETS &&
         update->type != PAGE_CPUID))
        return invalid();
    if (state != LAUNCHING)
        return refuse(command, SEV_RET_INVALID_GUEST_STATE);
    for (uint64_t done = 0; done < update->len; done += PAGE_SIZE) {
        if (update->type == PAGE_NORMAL)
            hash(EVP_sha384(), bytes + done, PAGE_SIZE, contents);
        snp_extend(gpa + done, update->type, update->type == PAGE_NORMAL ? contents : NULL);
    }
    record_update("snp_update", bytes, update->len, &gpa);
    record_number("type", update->type);
    record_end();
    /* KVM hands back what is left to do */
    update->gfn += update->len / PAGE_SIZE;
    update->uaddr += update->len;
    update->len = 0;
    return 0;
}

static void snp_measure_vmsa(const uint8_t page[PAGE_SIZE])
{
    uint8_t contents[48];

    hash(EVP_sha384(), page, PAGE_SIZE, contents);
    snp_extend(SNP_VMSA_GPA, PAGE_VMSA, contents);
}

/* The ID block holds the digest (at 0) and the policy (at 0x58) that the guest's owner wants. */
static int check_id_block(struct kvm_sev_cmd *command, const uint8_t *id_block)
{
    if (memcmp(id_block, snp_digest, sizeof snp_digest) != 0)
        return refuse(command, SEV_RET_BAD_MEASUREMENT);
    if (memcmp(id_block + 0x58, &policy, sizeof policy) != 0)
        return refuse(command, SEV_RET_POLICY_FAILURE);
    return 0;
}

static int snp_launch_finish(struct kvm_sev_cmd *command, const struct snp_finish *finish)
{
    const uint8_t *id_block = (const uint8_t *)(uintptr_t)finish->id_block;

    if (state != LAUNCHING)
        return refuse(command, SEV_RET_INVALID_GUEST_STATE);
    if (each_vmsa(snp_measure_vmsa) < 0)
        return -1;
    record_begin("snp_finish");
    record_hex("digest", snp_digest, sizeof snp_digest);
    record_hex("host_data", finish->host_data, sizeof finish->host_data);
    record_number("auth_key", finish->auth_key_en);
    if (finish->id_block_en) {
        record_hex("id_block", id_block, ID_BLOCK_SIZE);
        record_hex("id_auth", (const void *)(uintptr_t)finish->id_auth, ID_AUTH_SIZE);
    }
    record_end();
    if (finish->id_block_en && check_id_block(command, id_block) < 0)
        return -1;
    state = RUNNING;
    return 0;
}

bool launch_begun(void)
{
    return state != NONE;
}

int launch_command(struct kvm_sev_cmd *command)
{
    void *argument = (void *)(uintptr_t)command->data;

    command->error = 0;
    switch (command->id) {
    case CMD_INIT: return init("init", NULL);
    case CMD_ES_INIT: return init("es_init", NULL);
    case CMD_INIT2: return init("init2", argument);
    case CMD_LAUNCH_START: return launch_start(command, argument);
    case CMD_LAUNCH_UPDATE_DATA: return launch_update_data(command, argument);
    case CMD_LAUNCH_UPDATE_VMSA: return launch_update_vmsa(command);
    case CMD_LAUNCH_MEASURE: return launch_measure(command, argument);
    case CMD_LAUNCH_FINISH: return launch_finish(command);
    case CMD_SNP_LAUNCH_START: return snp_launch_start(command, argument);
    case CMD_SNP_LAUNCH_UPDATE: return snp_launch_update(command, argument);
    case CMD_SNP_LAUNCH_FINISH: return snp_launch_finish(command, argument);
    default: return invalid();
    }
}
