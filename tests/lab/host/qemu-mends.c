/*
 * Loaded into the lab's QEMU: mends two faults of its emulation of SVM. See Learnt in ../README.md for how they show.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/*
 * A guest's guest that writes CR8 while an interrupt waits for it (OVMF does at the end of each interrupt, Windows always) makes
 * QEMU set a bit of the processor without its lock: helper_write_crN() calls cpu_interrupt(), which asserts that it is held, and
 * QEMU ends. The bit may well be set without.
 *
 * In Debian's builds the way on begins right behind the call of the assertion, with padding: where that is so, go on there.
 */
typedef void assertion(const char *domain, const char *file, int line, const char *function, const char *expression);

assertion g_assertion_message_expr;

void g_assertion_message_expr(const char *domain, const char *file, int line, const char *function,
                              const char *expression)
{
    static const unsigned char padding[] = {0x0f, 0x1f, 0x00}; /* nopl (%rax) */

    if (expression && strcmp(expression, "bql_locked()") == 0 && strcmp(function, "tcg_handle_interrupt") == 0 &&
        memcmp(__builtin_return_address(0), padding, sizeof padding) == 0)
        return;
    ((assertion *)dlsym(RTLD_NEXT, "g_assertion_message_expr"))(domain, file, line, function, expression);
}

/*
 * helper_vmrun() notes the vector of an interrupt that it injects in the processor's exception_index, and nobody removes it, since
 * the interrupt has been delivered then. If the processor is told to leave its loop before the guest's next exit, it takes the
 * vector for an exception that is still to be delivered: the guest has the interrupt twice, the second time also where it allows
 * none. It survives that nearly everywhere, but not on the first instruction behind SYSCALL, where it has no stack.
 *
 * The note is of no use to anybody: it is not made any more. Found by its shape, between what is noted for the other fields.
 */
#define ANY 0x100

static const uint16_t note_of_vector[] = {
    0x41, 0x0f, 0xb6, 0xf4,                                          /* movzbl %r12b,%esi: the vector */
    0x44, 0x89, 0xab, ANY,  ANY,  ANY,  ANY,                         /* mov %r13d,error_code(%rbx) */
    0x89, 0xb3, ANY,  ANY,  ANY,  ANY,                               /* mov %esi,exception_index(%rbx) */
    0xc7, 0x83, ANY,  ANY,  ANY,  ANY,  0x00, 0x00, 0x00, 0x00,      /* movl $0,exception_is_int(%rbx) */
    0x48, 0xc7, 0x83, ANY,  ANY,  ANY,  ANY,  0xff, 0xff, 0xff, 0xff /* movq $-1,exception_next_eip(%rbx) */
};
#define LENGTH (sizeof note_of_vector / sizeof *note_of_vector)
#define STORE 11 /* where the one that is not made begins */

static unsigned char *find(unsigned char *from, const unsigned char *to)
{
    unsigned char *found = NULL;

    for (; from + LENGTH <= to; from++) {
        size_t same = 0;
        while (same < LENGTH && (note_of_vector[same] == ANY || note_of_vector[same] == from[same]))
            same++;
        if (same == LENGTH) {
            if (found)
                return NULL;
            found = from;
        }
    }
    return found;
}

__attribute__((constructor)) static void forget_the_vector(void)
{
    static const unsigned char nop[] = {0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00};
    unsigned char *vmrun = dlsym(RTLD_DEFAULT, "helper_vmrun"), *next = dlsym(RTLD_DEFAULT, "do_vmexit");
    unsigned char *note = vmrun && next ? find(vmrun, next) : NULL;
    uintptr_t size = (uintptr_t)sysconf(_SC_PAGESIZE), page;

    /* Another program of those that QEMU starts. */
    if (!vmrun)
        return;
    if (note) {
        page = (uintptr_t)(note + STORE) & ~(size - 1);
        if (mprotect((void *)page, 2 * size, PROT_READ | PROT_WRITE | PROT_EXEC) == 0) {
            memcpy(note + STORE, nop, sizeof nop);
            mprotect((void *)page, 2 * size, PROT_READ | PROT_EXEC);
            return;
        }
    }
    fputs("lab: this QEMU was built otherwise than those known: its guests' guests may get an interrupt twice, and die of it\n", stderr);
}
