// Sharing units of work out over threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

namespace saccade {

// libgomp's entry point, handed over by Python from the runtime that PyTorch runs on: one pool of threads for both.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
extern Parallel gomp_parallel;

template <class Body>
void team(int threads, Body& body) {
  auto call = [](void* data) { (*static_cast<Body*>(data))(); };
  if (threads <= 1) {
    body();
  } else if (gomp_parallel) {
    gomp_parallel(call, &body, unsigned(threads), 0);
  } else {
    std::vector<std::thread> others;
    try {
      for (int i = 1; i < threads; ++i) others.emplace_back(call, &body);
    } catch (...) {  // the system has no more threads or memory: those that started share the work
    }
    body();
    for (auto& other : others) other.join();
  }
}

// Runs unit(number, scratch) for all numbers, each thread taking the next one. 0, or 1 if memory ran out.
template <class Unit>
int share_out(int threads, int64_t units, int64_t scratch_bytes, const Unit& unit) {
  std::atomic<int64_t> next{0};
  std::atomic<int> failed{0};
  if (threads > units) threads = int(units);
  auto body = [&] {
    char* scratch = static_cast<char*>(std::aligned_alloc(64, size_t((scratch_bytes + 127) / 64 * 64)));
    if (!scratch) {
      failed = 1;
      return;
    }
    for (int64_t number; !failed && (number = next++) < units;) unit(number, scratch);
    std::free(scratch);
  };
  team(threads, body);
  return failed;
}

}  // namespace saccade
