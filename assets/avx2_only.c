/* Shows a program a CPU with AVX2 alone, at that CPU's real speed, on a newer Intel one with Linux:

     gcc -O2 -shared -fPIC assets/avx2_only.c -o out/avx2_only.so -ldl
     LD_PRELOAD=$PWD/out/avx2_only.so python -m pytest -q -p no:faulthandler

   Libraries choose their code by the CPUID instruction. Linux can make it a fault, where
   /proc/cpuinfo has the flag cpuid_fault. The handler runs the instruction and takes from its
   answer what came after AVX2 and FMA: AVX-512, AVX-VNNI, bfloat16, AMX. Threads and programs that
   are started inherit it. No other handler of that signal is let in: gcc has one, and faulthandler. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define BIT(n) (1u << (n))

static void allow_cpuid(long on) { syscall(SYS_arch_prctl, ARCH_SET_CPUID, on); }

static void on_fault(int signal_number, siginfo_t *info, void *context)
{
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)r[REG_RIP];
    unsigned leaf = r[REG_RAX], sub = r[REG_RCX], a = leaf, b, c = sub, d;
    if (!code || code[0] != 0x0f || code[1] != 0xa2) { /* not CPUID: a real fault */
        signal(SIGSEGV, SIG_DFL);
        return;
    }
    allow_cpuid(1);
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    allow_cpuid(0);
    if (leaf == 7 && sub == 0) {
        a = 0; /* no further leaves of features */
        /* AVX-512 F, DQ, IFMA, PF, ER, CD, BW, VL */
        b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));
        /* VBMI, VBMI2, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG, VPOPCNTDQ */
        c &= ~(BIT(1) | BIT(6) | BIT(8) | BIT(9) | BIT(10) | BIT(11) | BIT(12) | BIT(14));
        /* 4VNNIW, 4FMAPS, VP2INTERSECT, AMX-BF16, AVX512-FP16, AMX-TILE, AMX-INT8 */
        d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));
    } else if (leaf == 7 || leaf == 0x19 || leaf == 0x1d || leaf == 0x1e || leaf == 0x24) {
        a = b = c = d = 0;
    } else if (leaf == 0xd && sub == 0) { /* registers that are saved: x87, SSE, AVX */
        a &= 7;
        b = c = 832;
        d = 0;
    } else if (leaf == 0xd && sub > 2) {
        a = b = c = d = 0;
    }
    r[REG_RAX] = a;
    r[REG_RBX] = b;
    r[REG_RCX] = c;
    r[REG_RDX] = d;
    r[REG_RIP] += 2;
}

int sigaction(int number, const struct sigaction *new, struct sigaction *old)
{
    int (*real)(int, const struct sigaction *, struct sigaction *) = dlsym(RTLD_NEXT, "sigaction");
    int taken = number == SIGSEGV && new && new->sa_handler != SIG_DFL;
    if (taken && new->sa_sigaction != on_fault) {
        if (old)
            memset(old, 0, sizeof *old);
        return 0;
    }
    return real(number, new, old);
}

sighandler_t signal(int number, sighandler_t handler)
{
    sighandler_t (*real)(int, sighandler_t) = dlsym(RTLD_NEXT, "signal");
    return number == SIGSEGV && handler != SIG_DFL ? SIG_DFL : real(number, handler);
}

__attribute__((constructor)) static void begin(void)
{
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    action.sa_flags |= SA_RESTART;
    sigaction(SIGSEGV, &action, NULL);
    allow_cpuid(0);
}
