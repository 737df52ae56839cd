// A guest that does nothing but abuse its machine: random ports, registers, MSRs, PCI configuration, hypercalls and rings, on all
// processors at once, for ever. What it does follows from a seed, but for races between processors.
//
// Exceptions and interrupts only make it go on with the next thing. A reset of its own doing begins it anew with other numbers.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum {
	SEED = 0x100100,     // where the image has it
	STATE = 0x200000,    // survives a reset
	IDT = 0x210000,
	TRAMPOLINE = 0x8000,
	RAM = 0x1000000,     // what devices may write to: 16 to 112 MiB
	RAM_SIZE = 0x6000000,
	LAPIC = 0xfee00000,
	ECAM = 0xb0000000,
	BARS = 0xc1000000,   // where BARs are put for use: 64 KiB for each slot
	MAGIC = 0x41425553,
	CPUS = 8,
	SLOTS = 8,           // 1 to 8 may have devices
};

struct state {
	u32 magic, boots;
	u64 random[CPUS];
};

#define state ((volatile struct state *)STATE)

extern void exception(void);
extern u8 trampoline[], trampoline_end[], idt_pointer[];

static void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static void out16(u16 port, u16 value) { __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port)); }
static void out32(u16 port, u32 value) { __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }
static u32 in8(u16 port) { u8 value; __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static u32 in16(u16 port) { u16 value; __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static u32 in32(u16 port) { u32 value; __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port)); return value; }

static volatile u8 *at8(u32 address) { return (volatile u8 *)address; }
static volatile u16 *at16(u32 address) { return (volatile u16 *)address; }
static volatile u32 *at32(u32 address) { return (volatile u32 *)address; }

// xorshift
static u32 draw(u32 cpu)
{
	u64 x = state->random[cpu];
	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	state->random[cpu] = x;
	return (u32)(x >> 16);
}

static u32 below(u32 cpu, u32 bound) { return draw(cpu) % bound; }

// Values that hardware cares about more often than chance would have it.
static u32 value(u32 cpu)
{
	switch (below(cpu, 8)) {
	case 0: return 0;
	case 1: return ~0u;
	case 2: return 1u << below(cpu, 32);
	case 3: return below(cpu, 16);
	case 4: return RAM + below(cpu, RAM_SIZE);
	case 5: return (RAM + below(cpu, RAM_SIZE)) & ~0xfffu;
	case 6: return BARS + below(cpu, 0x100000);
	default: return draw(cpu);
	}
}

struct range { u32 base, length; };

static const struct range PORTS[] = {
	{ 0x600, 0x80 }, { 0x680, 8 }, { 0xb2, 2 }, { 0x70, 2 }, { 0x60, 5 }, { 0x3f8, 8 }, { 0x505, 1 }, { 0x402, 1 }, { 0xcf8, 8 },
	{ 0x510, 12 }, { 0x20, 2 }, { 0xa0, 2 }, { 0x40, 4 }, { 0x4d0, 2 }, { 0x61, 1 }, { 0, 0x10000 },
};

static const struct range MEMORY[] = {
	{ ECAM, 0x1000 }, { ECAM + (31 << 15), 0x1000 }, { ECAM + (1 << 15), 8 << 15 }, { ECAM, 0x10000000 }, { BARS, SLOTS << 16 },
	{ BARS, SLOTS << 16 }, { 0xfed40000, 0x1000 }, { 0xfed45000, 0x400 }, { 0xffc00000, 0x400000 }, { 0xfed00000, 0x400 },
	{ 0xb0000000, 0x4ec00000 },
};

static const struct range MSRS[] = {
	{ 0x40000000, 0x200 }, { 0x4b564d00, 9 }, { 0x11, 2 }, { 0xc0000080, 5 }, { 0xc0000100, 4 }, { 0x200, 0x20 }, { 0x174, 3 },
	{ 0x1c, 0x300 }, { 0x6e0, 1 }, { 0xc0010000, 0x200 }, { 0x480, 0x20 }, { 0x1000, 0xffffffff },
};

// Writes that end this run of the guest: seldom, else nothing else happens.
static int ends(u32 cpu, u32 port, u32 width)
{
	u32 end = port + width;
	int reset = (port <= 0xcf9 && end > 0xcf9) || (port <= 0x64 && end > 0x64) || (port <= 0x92 && end > 0x92);
	int sleep = port <= 0x605 && end > 0x604;
	return (reset || sleep) && below(cpu, 300);
}

static u32 some_port(u32 cpu)
{
	struct range r = PORTS[below(cpu, sizeof PORTS / sizeof *PORTS)];
	return (u16)(r.base + below(cpu, r.length));
}

static void port(u32 cpu)
{
	u32 p = some_port(cpu), width = 1u << below(cpu, 3), v = value(cpu);
	if (below(cpu, 2)) {
		if (width == 1) in8(p); else if (width == 2) in16(p); else in32(p);
	} else if (!ends(cpu, p, width)) {
		if (width == 1) out8(p, v); else if (width == 2) out16(p, v); else out32(p, v);
	}
}

// Many at once, from or to RAM.
static void string(u32 cpu)
{
	u32 p = some_port(cpu), count = below(cpu, 600), address = RAM + below(cpu, RAM_SIZE);
	int write = below(cpu, 2) && !ends(cpu, p, 4);
	switch (below(cpu, 2) * 2 + write) {
	case 0: __asm__ volatile("rep insb" : "+D"(address), "+c"(count) : "d"(p) : "memory"); break;
	case 1: __asm__ volatile("rep outsb" : "+S"(address), "+c"(count) : "d"(p) : "memory"); break;
	case 2: __asm__ volatile("rep insl" : "+D"(address), "+c"(count) : "d"(p) : "memory"); break;
	default: __asm__ volatile("rep outsl" : "+S"(address), "+c"(count) : "d"(p) : "memory"); break;
	}
}

// The local APICs are the kernel's: an INIT to oneself would only end the abuse.
static int is_kernels(u32 address) { return address >= 0xfebff000 && address < 0xfed00000; }

static void memory(u32 cpu)
{
	struct range r = MEMORY[below(cpu, sizeof MEMORY / sizeof *MEMORY)];
	u32 address = r.base + below(cpu, r.length), v = value(cpu), count, source;
	if (is_kernels(address) || address >= LAPIC - 8 && address < LAPIC + 0x101000) return;
	switch (below(cpu, 9)) {
	case 0: *at8(address); break;
	case 1: *at16(address); break;
	case 2: *at32(address); break;
	case 3: *at8(address) = v; break;
	case 4: *at16(address) = v; break;
	case 5: *at32(address) = v; break;
	case 6: __asm__ volatile("lock orl %1, %0" : "+m"(*at32(address)) : "r"(v)); break;
	default:
		count = below(cpu, 64);
		source = RAM + below(cpu, RAM_SIZE);
		if (below(cpu, 2)) { u32 other = source; source = address; address = other; }
		__asm__ volatile("rep movsl" : "+S"(source), "+D"(address), "+c"(count) : : "memory");
	}
}

static void msr(u32 cpu)
{
	struct range r = MSRS[below(cpu, sizeof MSRS / sizeof *MSRS)];
	u32 number = r.base + below(cpu, r.length), low = value(cpu), high = below(cpu, 4) ? 0 : value(cpu);
	if (number == 0x1b || number >> 8 == 8) return;
	// Pages that the hypervisor is to write lie in RAM: the program must live.
	if (number >> 16 == 0x4000 || number >> 8 == 0x4b564d || number < 0x13) {
		high = 0;
		low = (RAM + below(cpu, RAM_SIZE)) & ~0xfffu;
		low |= below(cpu, 2) | (below(cpu, 4) ? 0 : below(cpu, 0x1000));
	}
	if (below(cpu, 2)) __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(number));
	else __asm__ volatile("wrmsr" : : "c"(number), "a"(low), "d"(high));
}

static void hypercall(u32 cpu)
{
	u32 number = below(cpu, 2) ? below(cpu, 16) : value(cpu);
	__asm__ volatile("vmcall" : "+a"(number) : "b"(value(cpu)), "c"(value(cpu)), "d"(value(cpu)) : "memory");
}

static u32 config_address(u32 slot, u32 reg) { return 0x80000000u | slot << 11 | (reg & 0xfc); }

static void config(u32 cpu)
{
	u32 slot = below(cpu, 4) ? below(cpu, SLOTS + 1) : below(cpu, 32), reg = below(cpu, 256), v = value(cpu);
	// The bridge is left where it is, in most cases, or ECAM is nowhere.
	if (slot == 0 && below(cpu, 16)) slot = 1;
	out32(0xcf8, config_address(slot, reg) | (below(cpu, 16) ? 0 : draw(cpu) & 0xffffff));
	switch (below(cpu, 4)) {
	case 0: in32(0xcfc); break;
	case 1: out8(0xcfc + (reg & 3), v); break;
	case 2: out16(0xcfc + (reg & 2), v); break;
	default: out32(0xcfc, v);
	}
}

static void set_config(u32 slot, u32 reg, u32 v)
{
	out32(0xcf8, config_address(slot, reg));
	out32(0xcfc, v);
}

// A descriptor that is right in most cases.
static void descriptor(u32 cpu, u32 table, u32 index, u32 size)
{
	u32 at = table + index * 16;
	int wrong = !below(cpu, 24);
	*at32(at) = wrong ? value(cpu) : RAM + below(cpu, RAM_SIZE);
	*at32(at + 4) = wrong ? below(cpu, 4) : 0;
	*at32(at + 8) = wrong ? value(cpu) : 1u << below(cpu, 14);
	*at16(at + 12) = wrong ? draw(cpu) : below(cpu, 4);
	*at16(at + 14) = wrong ? draw(cpu) : (index + 1) % size;
}

// A request as devices know them: of a disk (header, data, status), or a command of a network card.
static void request(u32 cpu, u32 table, u32 first, u32 size)
{
	u32 header = (RAM + below(cpu, RAM_SIZE - 0x100000)) & ~0xfu, kind = below(cpu, 15);
	*at32(header) = below(cpu, 2) ? kind : kind | kind << 8;
	*at32(header + 4) = 0;
	*at32(header + 8) = below(cpu, 3000);
	*at32(header + 12) = 0;
	for (u32 i = 0; i < 3; i++) {
		u32 at = table + (first + i) % size * 16;
		*at32(at) = i == 0 ? header : RAM + below(cpu, RAM_SIZE - 0x100000);
		*at32(at + 4) = 0;
		*at32(at + 8) = i == 0 ? (below(cpu, 2) ? 16 : 2) : i == 1 ? 512 * below(cpu, 9) : 1;
		*at16(at + 12) = (i < 2 ? 1 : 0) | (i == 2 || (i == 1 && below(cpu, 2)) ? 2 : 0);
		*at16(at + 14) = (first + i + 1) % size;
	}
}

// A device from its reset to kicks of its rings, with something else wrong each time.
static void rings(u32 cpu)
{
	u32 slot = 1 + below(cpu, SLOTS), bar = BARS + (slot << 16), queues = 1 + below(cpu, 5), size = 16u << below(cpu, 5);
	set_config(slot, 0x10, bar);
	set_config(slot, 0x14, 0);
	set_config(slot, 0x04, 6);
	*at8(bar + 20) = 0;
	for (u32 i = 0; i < 200 && *at8(bar + 20); i++) {}
	*at8(bar + 20) = 3;
	for (u32 half = 0; half < 2; half++) {
		*at32(bar) = half;
		u32 offered = *at32(bar + 4);
		*at32(bar + 8) = half;
		*at32(bar + 12) = below(cpu, 8) ? offered & (draw(cpu) | half) : value(cpu);
	}
	*at8(bar + 20) = 11;
	u32 area = (RAM + below(cpu, RAM_SIZE - 0x100000)) & ~0xfffu;
	for (u32 queue = 0; queue < queues; queue++) {
		u32 ring = area + queue * 0x10000, registers[3] = { ring, ring + 0x4000, ring + 0x8000 };
		for (u32 i = 0; i < size; i++) descriptor(cpu, ring, i, size);
		if (below(cpu, 4)) request(cpu, ring, 0, size);
		for (u32 i = 0; i < 8; i++) *at16(ring + 0x4004 + i * 2) = below(cpu, 40) ? below(cpu, 4) * 3 : draw(cpu);
		*at16(ring + 0x4000) = below(cpu, 2);
		*at16(ring + 0x4002) = below(cpu, 8) ? 1 + below(cpu, 7) : draw(cpu);
		*at16(bar + 22) = queue;
		*at16(bar + 24) = size;
		*at16(bar + 26) = queue;
		for (u32 i = 0; i < 3; i++) {
			*at32(bar + 32 + i * 8) = registers[i];
			*at32(bar + 36 + i * 8) = 0;
		}
		*at16(bar + 28) = 1;
	}
	*at8(bar + 20) = 15;
	for (u32 i = below(cpu, 12); i; i--) {
		u32 queue = below(cpu, queues), ring = area + queue * 0x10000;
		*at16(ring + 0x4002) += below(cpu, 8) ? 1 : draw(cpu);
		*at32(bar + 0x4000 + queue * 4) = queue;
	}
	if (below(cpu, 2)) *at8(bar + 0x2000 + below(cpu, 64)) = value(cpu);
}

// The signature of fw_cfg's DMA, with a random command.
static void dma(u32 cpu)
{
	u32 at = (RAM + below(cpu, RAM_SIZE)) & ~0xfu, words[4] = { draw(cpu) & 0x1f, value(cpu) >> 12, 0, value(cpu) };
	if (below(cpu, 2)) words[0] |= below(cpu, 0x30) << 16;
	for (u32 i = 0; i < 4; i++) *at32(at + i * 4) = __builtin_bswap32(words[i]);
	out32(0x514, 0);
	out32(0x518, __builtin_bswap32(at));
}

void abuse(u32 cpu)
{
	cpu %= CPUS;
	switch (below(cpu, 16)) {
	case 0: case 1: case 2: port(cpu); break;
	case 3: string(cpu); break;
	case 4: case 5: case 6: memory(cpu); break;
	case 7: msr(cpu); break;
	case 8: hypercall(cpu); break;
	case 9: case 10: config(cpu); break;
	case 11: dma(cpu); break;
	case 12: *at32(RAM + (below(cpu, RAM_SIZE) & ~3u)) = value(cpu); break;
	default: rings(cpu);
	}
}

void prepare(void)
{
	if (state->magic != MAGIC) {
		state->magic = MAGIC;
		state->boots = 0;
	}
	state->boots++;
	for (u32 cpu = 0; cpu < CPUS; cpu++)
		state->random[cpu] = (*(volatile u64 *)SEED ^ (u64)state->boots << 40 ^ (u64)cpu << 56) | 1;
	for (u32 vector = 0; vector < 256; vector++) {
		u32 handler = (u32)exception;
		*at32(IDT + vector * 8) = (handler & 0xffff) | 0x10 << 16;
		*at32(IDT + vector * 8 + 4) = (handler & 0xffff0000) | 0x8e00;
	}
	__asm__ volatile("lidt %0" : : "m"(*(volatile u8 *)idt_pointer));
	for (u32 i = 0; trampoline + i < trampoline_end; i++) *at8(TRAMPOLINE + i) = trampoline[i];
	// All others: INIT, then start at the trampoline.
	*at32(LAPIC + 0xf0) = 0x1ff;
	*at32(LAPIC + 0x300) = 0xc4500;
	for (volatile u32 i = 0; i < 100000; i++) {}
	*at32(LAPIC + 0x300) = 0xc4600 | TRAMPOLINE >> 12;
}
