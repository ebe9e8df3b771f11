// Best-first searches in graphs of stored keys, a query head each.
#include "engine.hpp"
#include "export.hpp"
#include "threads.hpp"

using namespace saccade;

// 0, or 1 if memory ran out.
EXPORT int saccade_search(const Search* p) {
  const int64_t heads = p->cache.a.heads;
  return share_out(p->cache.a.threads, p->cache.a.batch * heads, engine->search_scratch(*p), [=](int64_t number, char* scratch) {
    engine->search(*p, scratch, number / heads, number % heads);
  });
}
