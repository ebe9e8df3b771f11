// Large pages for what the engine is about to write.
#pragma once
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace saccade {

// Results this large come fresh from the system at every call (malloc keeps none of 32 MiB and more), a fault for each page
// that is first written: more time than some kernels need to fill it. Where the system lets memory ask for large pages,
// this does; elsewhere nothing happens.
inline void expect_writing(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = uintptr_t(2) << 20;
  if (bytes < int64_t(8 * PAGE)) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / PAGE * PAGE;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: refused, all runs as before
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace saccade
