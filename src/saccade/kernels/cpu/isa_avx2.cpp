#if defined(__AVX2__) && defined(__FMA__)
#define SACCADE_ISA avx2
#define SACCADE_NAME "AVX2 and FMA"
#define SACCADE_LANES 8
#include "engine.inl"
const saccade::Engine* saccade::engine_avx2() { return &avx2::ENGINE; }
#else
#include "engine.hpp"
const saccade::Engine* saccade::engine_avx2() { return nullptr; }
#endif
