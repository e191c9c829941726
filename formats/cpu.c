/* Which instructions this CPU has. The CPU itself is asked: compilers' built-in tests differ, and Zig's always says
 * no. */

#include "kernels.h"

int df11_use_avx2, df11_use_sha;

#ifdef HAVE_AVX2
#include <cpuid.h>

static int has(unsigned word, unsigned bit)
{
    return word >> bit & 1;
}

void df11_choose_instructions(void)
{
    unsigned a, b, c, d, enabled, unused;

    if (__get_cpuid_max(0, 0) < 7 || __get_cpuid_max(0x80000000, 0) < 0x80000001)
        return;
    __cpuid(0x80000001, a, b, c, d);
    int lzcnt = has(c, 5);
    __cpuid(1, a, b, c, d);
    if (!lzcnt || !has(c, 27) || !has(c, 28)) /* xgetbv, AVX */
        return;
    __asm__("xgetbv" : "=a"(enabled), "=d"(unused) : "c"(0));
    if ((enabled & 6) != 6) /* The system keeps the vector registers. */
        return;
    __cpuid_count(7, 0, a, b, c, d);
    df11_use_avx2 = has(b, 3) && has(b, 5) && has(b, 8); /* BMI1, AVX2, BMI2 */
    df11_use_sha = df11_use_avx2 && has(b, 29);
}
#else
void df11_choose_instructions(void)
{
}
#endif
