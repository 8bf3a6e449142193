/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Start of the guest: vCPU 0 builds the tables with the MMU off, vCPU 1 comes by
 * PSCI and takes the same.  Both go on at the high addresses, as a kernel does.
 */
	.global _start, second, enter_el0, vectors, user_code

	.section .text.start, "ax"
_start:
	adrp	x0, stacks + 16384
	mov	sp, x0
	bl	build_tables
	adr	x20, main
	b	enable_mmu
second:
	adrp	x0, stacks + 32768
	mov	sp, x0
	adr	x20, second_main

enable_mmu:
	adrp	x0, root0
	mov	x1, #1				/* ASID */
	orr	x0, x0, x1, lsl #48
	msr	ttbr0_el1, x0
	adrp	x0, root1
	msr	ttbr1_el1, x0
	ldr	x0, =0x00ff			/* 0: normal memory, 1: device */
	msr	mair_el1, x0
	/* 4K pages, 39 bits, 40 bits of PA, 16 bits of ASID, HA and HD */
	ldr	x0, =(25 | 25 << 16 | 2 << 30 | 2 << 32 | 1 << 36 | 1 << 39 | 1 << 40 | 0x3500 | 0x35000000)
	msr	tcr_el1, x0
	mov	x0, #(3 << 20)			/* floating point: the compiler may */
	msr	cpacr_el1, x0
	tlbi	vmalle1
	dsb	nsh
	isb
	mrs	x0, sctlr_el1
	ldr	x1, =0x1005			/* M, C, I */
	orr	x0, x0, x1
	msr	sctlr_el1, x0
	isb
	mov	x1, #0xffffff8000000000
	add	x20, x20, x1
	mov	x2, sp
	add	sp, x2, x1
	br	x20

	.text
/* Go to the program, which comes straight back */
enter_el0:
	stp	x29, x30, [sp, #-16]!
	msr	elr_el1, x0
	mov	x1, #0x3c0			/* EL0, no interrupts */
	msr	spsr_el1, x1
	eret

user_code:
	svc	#0

	.balign 2048
vectors:
	.rept	8
	b	stuck
	.balign 128
	.endr
	ldp	x29, x30, [sp], #16		/* from EL0: the end of enter_el0 */
	ret
	.balign 128
	.rept	7
	b	stuck
	.balign 128
	.endr
