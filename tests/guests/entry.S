# Where the abuser begins on each processor. The boot processor comes in 32-bit protected mode without paging, with the segments
# of tests/src/tiny.rs; the others begin in real mode in a copy of `trampoline` at 0x8000.

        .set STACKS, 0x300000           # 64 KiB for each processor: the stack pointer says which one it is
        .set TRAMPOLINE, 0x8000

        .text
        .code32
        .globl start
start:
        xorl %ebx, %ebx
        movl $(STACKS + 0xfff0), %esp
        pushl %ebx
        call prepare
        jmp go_on

        .globl trampoline, trampoline_end
trampoline:
        .code16
        cli
        xorw %ax, %ax
        movw %ax, %ds
        lgdtl (TRAMPOLINE + pointer - trampoline)
        movl %cr0, %eax
        orl $1, %eax
        movl %eax, %cr0
        ljmpl $0x10, $application
pointer:
        .word 31
        .long 0x100000                  # the GDT of tests/src/tiny.rs
trampoline_end:

        .code32
application:
        movw $0x18, %ax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %ss
        movl $1, %ebx
        lock xaddl %ebx, processors
        shll $16, %ebx
        leal (STACKS + 0xfff0)(%ebx), %esp
        lidt idt_pointer
        jmp go_on

# Exceptions, and whatever interrupts devices made up: on with the next abuse, on a fresh stack.
        .globl exception
exception:
        movw $0x18, %ax
        movw %ax, %ds
        movw %ax, %es
        cld
go_on:
        movl %esp, %ebx
        andl $0xffff0000, %ebx
        leal 0xfff0(%ebx), %esp
        subl $STACKS, %ebx
        shrl $16, %ebx
        pushl %ebx
        call abuse
        jmp go_on

        .globl idt_pointer
idt_pointer:
        .word 0x7ff
        .long 0x210000
        .globl processors
processors:
        .long 1
