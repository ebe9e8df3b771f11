#if 1
#define SACCADE_ISA portable
#define SACCADE_NAME "portable"
#define SACCADE_LANES 4
#include "engine.inl"
const saccade::Engine* saccade::engine_portable() { return &portable::ENGINE; }
#else
#include "engine.hpp"
const saccade::Engine* saccade::engine_portable() { return nullptr; }
#endif
