// Races on global memory between clusters: see global_watch.h.
#include "global_watch.h"

#include <algorithm>

#include "machine.h"

namespace dsv4::sim {

void GlobalWatch::join(Seen& into, const Seen& from) {
  for (const auto& [cluster, clock] : from) {
    uint32_t& mine = into[cluster];
    mine = std::max(mine, clock);
  }
}

void GlobalWatch::fence(Ctx& c) {
  Entity& me = entities_[c.cta->cluster->index];
  me.fenced = me.seen;
  me.fenced[c.cta->cluster->index] = me.clock++;
}

void GlobalWatch::touch(Ctx& c, const Instr& in, uint64_t address, uint32_t bytes, Touch kind, const void* value) {
  Area* area = nullptr;
  for (Area& a : areas_) if (address >= a.low && address < a.high) area = &a;
  if (!area) return;
  const uint64_t self = c.cta->cluster->index;
  Entity& me = entities_[self];
  const bool write = kind == Touch::write || kind == Touch::strong_write || kind == Touch::atomic, strong = kind != Touch::read && kind != Touch::write;
  if (strong) {
    Seen& place = places_[address];
    if (kind != Touch::strong_write) join(me.seen, place);
    if (kind != Touch::strong_read) join(place, me.fenced);
  }
  const Raw* raw = &c.raw(in);
  const auto ordered = [&](const Mark& m) {
    if (m.cluster == self + 1 || (strong && m.strong)) return true;
    const auto it = me.seen.find(m.cluster - 1);
    return it != me.seen.end() && it->second >= m.clock;
  };
  const auto report = [&](const Mark& m, const char* did) {
    fail("hazard in global memory: %s %u bytes at offset %llu of a buffer, which cluster %u of the grid %s at PTX line %u (%s: '%s'), with no synchronisation between", write ? "writes" : "reads",
         bytes, (unsigned long long)(address - area->low), m.cluster - 1, did, m.raw->line, source_of(c.machine->module, *m.raw).c_str(), show(*m.raw).c_str());
  };
  const bool same = write && value && kind == Touch::write && std::memcmp(reinterpret_cast<const void*>(address), value, bytes) == 0;
  const uint64_t base = address - area->low;
  if (area->pages.empty()) area->pages.resize((area->high - area->low + 1023) / 1024);
  for (uint64_t b = base; b < base + bytes;) {
    const uint64_t end = std::min(base + bytes, (b / 4 + 1) * 4);
    const auto mask = static_cast<uint8_t>(((1u << (end - b)) - 1) << (b % 4));
    auto& page = area->pages[b / 1024];
    if (!page) page = std::make_unique<Page>();  // value-initialised: no marks
    Word& w = page->words[b % 1024 / 4];
    if (w.write.cluster && w.write.mask & mask && !same && !ordered(w.write)) report(w.write, "writes");
    if (write && w.read.cluster && w.read.mask & mask && !same && !ordered(w.read)) report(w.read, "reads");
    Mark& mark = write ? w.write : w.read;
    const bool again = mark.cluster == self + 1 && mark.clock == me.clock;
    mark = {raw, static_cast<uint32_t>(self + 1), me.clock, static_cast<uint8_t>(again ? mark.mask | mask : mask), strong};
    b = end;
  }
}

}  // namespace dsv4::sim
