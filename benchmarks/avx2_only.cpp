// Lets a program see a processor without AVX-512, VNNI and AMX, to compare libraries that cannot be told which to use.
//
//   g++ -O2 -shared -fPIC -o avx2_only.so benchmarks/avx2_only.cpp
//   LD_PRELOAD=./avx2_only.so python -m benchmarks.engine --parts streams
//
// Linux on x86-64 can make the instruction CPUID fail; the handler of that failure returns what the processor says, without
// the bits of those instruction sets. Programs then choose AVX2 by themselves. Source: arch_prctl(2), ARCH_CPUID; Intel
// Software Developer's Manual, volume 2A, CPUID.
#include <asm/prctl.h>
#include <cpuid.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

// Bits of leaf 7.
constexpr uint32_t kEbx = 1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31;  // AVX-512
constexpr uint32_t kEcx = 1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14;            // its extensions, with VNNI
constexpr uint32_t kEdx = 1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25;  // and AMX
constexpr uint32_t kEax1 = 1u << 4 | 1u << 5 | 1u << 21 | 1u << 23;                      // of its second part: AVX-VNNI, bf16
constexpr uint32_t kEdx1 = 1u << 4 | 1u << 5 | 1u << 8 | 1u << 10 | 1u << 19;            // AVX-VNNI-INT8, AVX10

void allow_cpuid(bool allow) { syscall(SYS_arch_prctl, ARCH_SET_CPUID, allow); }

void answer(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  if (code[0] != 0x0f || code[1] != 0xa2) {  // another fault: let it end the program
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  const auto leaf = static_cast<uint32_t>(registers[REG_RAX]), part = static_cast<uint32_t>(registers[REG_RCX]);
  uint32_t eax, ebx, ecx, edx;
  allow_cpuid(true);
  __cpuid_count(leaf, part, eax, ebx, ecx, edx);
  allow_cpuid(false);
  if (leaf == 7 && part == 0) ebx &= ~kEbx, ecx &= ~kEcx, edx &= ~kEdx;
  if (leaf == 7 && part == 1) eax &= ~kEax1, edx &= ~kEdx1;
  registers[REG_RAX] = eax, registers[REG_RBX] = ebx, registers[REG_RCX] = ecx, registers[REG_RDX] = edx;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) void start() {
  struct sigaction action = {};
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, nullptr);
  if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0) != 0) {
    std::perror("avx2_only: this processor or kernel cannot hide instruction sets");
    std::exit(1);
  }
}

}  // namespace
