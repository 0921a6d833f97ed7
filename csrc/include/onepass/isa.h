// One object of kernels per instruction set, chosen once at load.
#pragma once

#if defined(__x86_64__)
#define ONEPASS_FOR_EACH_ISA(X) X(baseline) X(avx2) X(avx512) X(avx512_vnni) X(avx512_bf16)
#elif defined(__aarch64__)
#define ONEPASS_FOR_EACH_ISA(X) X(neon)
#else
#define ONEPASS_FOR_EACH_ISA(X) X(generic)
#endif

// In a stem's header, inside namespace onepass: ONEPASS_KERNELS(ReparamKernels, reparam) declares
// <isa>::reparam, a constant table of function pointers that csrc/cpu/<stem>.cpp defines once per instruction set.
#define ONEPASS_DECLARE_TABLE(isa, Table, name) \
  namespace isa {                               \
  extern const Table name;                      \
  }
#if defined(__x86_64__)
#define ONEPASS_KERNELS(Table, name)              \
  ONEPASS_DECLARE_TABLE(baseline, Table, name)    \
  ONEPASS_DECLARE_TABLE(avx2, Table, name)        \
  ONEPASS_DECLARE_TABLE(avx512, Table, name)      \
  ONEPASS_DECLARE_TABLE(avx512_vnni, Table, name) \
  ONEPASS_DECLARE_TABLE(avx512_bf16, Table, name)
#elif defined(__aarch64__)
#define ONEPASS_KERNELS(Table, name) ONEPASS_DECLARE_TABLE(neon, Table, name)
#else
#define ONEPASS_KERNELS(Table, name) ONEPASS_DECLARE_TABLE(generic, Table, name)
#endif

namespace onepass {

enum class Isa : int {
#define ONEPASS_ENUM(isa) isa,
  ONEPASS_FOR_EACH_ISA(ONEPASS_ENUM)
#undef ONEPASS_ENUM
};

}  // namespace onepass
