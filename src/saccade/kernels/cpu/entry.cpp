// The library as a whole: whose threads it uses, and which instruction set.
#include "engine.hpp"
#include "export.hpp"
#include "threads.hpp"

namespace saccade {

Parallel gomp_parallel = nullptr;
const Engine* engine = nullptr;

namespace {

const Engine* engine_named(int number) {
  switch (number) {
    case 0: return engine_avx512_bf16();
    case 1: return engine_avx512();
    case 2: return engine_avx2();
    default: return engine_portable();
  }
}

bool machine_has(int number) {
#if defined(__x86_64__)
  switch (number) {
    case 0: return machine_has(1) && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    case 1: return machine_has(2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case 2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return number == 3;
}

}  // namespace
}  // namespace saccade

using namespace saccade;

EXPORT void saccade_threads_from(void* gomp) { gomp_parallel = reinterpret_cast<Parallel>(gomp); }

// Takes instruction set 0 .. 3 (see engine_named), or the best for -1; its name, or null if this machine has it not.
EXPORT const char* saccade_use(int number) {
  for (int candidate = number < 0 ? 0 : number; candidate < 4; ++candidate) {
    if (machine_has(candidate) && engine_named(candidate)) {
      engine = engine_named(candidate);
      return engine->name;
    }
    if (number >= 0) return nullptr;
  }
  return nullptr;
}

// Of the sources it was built from, so that a build that is out of date is noticed.
EXPORT const char* saccade_digest() { return SACCADE_DIGEST; }

EXPORT const char* saccade_using() { return engine->name; }
