#if defined(__AVX512BF16__)
#define SACCADE_ISA avx512_bf16
#define SACCADE_NAME "AVX-512 with bf16 dot products"
#define SACCADE_LANES 16
#include "engine.inl"
const saccade::Engine* saccade::engine_avx512_bf16() { return &avx512_bf16::ENGINE; }
#else
#include "engine.hpp"
const saccade::Engine* saccade::engine_avx512_bf16() { return nullptr; }
#endif
