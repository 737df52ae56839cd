/*
 * Loaded into the lab's QEMU. A guest's guest that writes CR8 while an interrupt waits for it (OVMF does at the end of each
 * interrupt, Windows always) makes QEMU set a bit of the processor without its lock: helper_write_crN() calls cpu_interrupt(),
 * which asserts that it is held, and QEMU ends. The bit may well be set without; see Learnt in ../README.md.
 *
 * In Debian's builds the way on begins right behind the call of the assertion, with padding: where that is so, go on there.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>

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
