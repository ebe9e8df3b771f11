#if defined(__AVX512F__)
#define SACCADE_ISA avx512
#define SACCADE_NAME "AVX-512"
#define SACCADE_LANES 16
#include "engine.inl"
const saccade::Engine* saccade::engine_avx512() { return &avx512::ENGINE; }
#else
#include "engine.hpp"
const saccade::Engine* saccade::engine_avx512() { return nullptr; }
#endif
