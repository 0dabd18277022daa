// Races on global memory between clusters of one launch. A cluster is one entity here: what its own warps do to each other
// through global memory is not looked at. Only buffers that may be written are watched.
// Order comes from flags: what a fence (or .release) of a cluster has covered goes with its next atomic or volatile write,
// and is acquired by the cluster that reads that place with an atomic or volatile access.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "hazards.h"

namespace dsv4::sim {

struct Instr;

class GlobalWatch {
 public:
  void add(uint64_t low, uint64_t high) { areas_.push_back({low, high, {}}); }
  // Before the access; `value` is what a write is about to store (equal bytes do no harm).
  void touch(Ctx& c, const Instr& in, uint64_t address, uint32_t bytes, Touch kind, const void* value);
  void fence(Ctx& c);

 private:
  using Seen = std::unordered_map<uint64_t, uint32_t>;  // cluster -> clock
  struct Mark { const Raw* raw; uint32_t cluster, clock; uint8_t mask; bool strong; };  // cluster plus one
  struct Word { Mark write, read; };
  struct Page { Word words[256]; };
  struct Area { uint64_t low, high; std::vector<std::unique_ptr<Page>> pages; };
  struct Entity { uint32_t clock = 1; Seen seen, fenced; };
  static void join(Seen& into, const Seen& from);
  std::vector<Area> areas_;
  std::unordered_map<uint64_t, Entity> entities_;
  std::unordered_map<uint64_t, Seen> places_;
};

}  // namespace dsv4::sim
