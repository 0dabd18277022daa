// The happens-before check of a cluster's shared memory: vector clocks of warps and of asynchronous operations.
// A warp's clock ticks when it releases (barrier, arrival, fence); an access is ordered after another one if the lane has
// acquired, directly or through others, what the other's clock said at the time. Two unordered accesses of one word of
// shared memory, one of them a write, are a hazard, whatever the schedule made of them.
// Lanes of a warp are told apart where it matters: what some lanes release covers their own accesses only, and what some
// lanes acquire is theirs alone, until bar.warp.sync or a barrier. Reads are also ordered by any instruction that waits for
// all lanes (.sync): none of them goes on before its lanes have come so far.
// An asynchronous operation is an entity of its own: its accesses count from its issue, and end for whoever waits for its
// group or its mbarrier. All cp.async of a warp are one entity, whose clock counts their groups: their end is known to the
// lane that issued and awaited them, and to others as something that this lane did when it waited.
// A second clock says which writes of threads the async proxy may see (fence.proxy.async).
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "blocks.h"

namespace dsv4::sim {

struct Ctx;
struct Cta;
struct Raw;
struct Warp;

class Clock {  // up to which of its clocks the accesses of each entity are known
 public:
  uint32_t at(uint32_t e) const { return e < v_.size() ? v_[e] : 0; }
  void raise(uint32_t e, uint32_t c) {
    if (e >= v_.size()) v_.resize(e + 1, 0);
    if (v_[e] < c) v_[e] = c;
  }
  void raise(uint32_t e, uint32_t c, uint32_t lanes);  // of some lanes of warp e
  // Of these lanes, those whose accesses at clock c are not known.
  uint32_t unknown(uint32_t e, uint32_t c, uint32_t lanes) const {
    if (at(e) >= c) return 0;
    for (const Part& p : parts_) if (p.entity == e && p.clock >= c) lanes &= ~p.lanes;
    return lanes;
  }
  void join(const Clock& o) {
    if (o.v_.size() > v_.size()) v_.resize(o.v_.size(), 0);
    for (size_t i = 0; i < o.v_.size(); ++i) v_[i] = v_[i] < o.v_[i] ? o.v_[i] : v_[i];
    for (const Part& p : o.parts_) raise(p.entity, p.clock, p.lanes);
  }
  void copy(uint32_t e, const Clock& o);  // what it knows of e becomes what o knows
  void clear() { v_.clear(); parts_.clear(); }

 private:
  struct Part { uint32_t entity, clock, lanes; };  // each lane once per entity
  std::vector<uint32_t> v_;
  std::vector<Part> parts_;  // further on than v_, of some lanes
};

struct Order {  // what a synchronising object carries
  Clock seen, proxy;
  Clock reads;  // like `seen`, but of reads alone
  Clock inits;  // like `seen`, but for mbarrier.init and the start of a CTA alone: relaxed arrivals carry it too
  void join(const Order& o) { seen.join(o.seen); proxy.join(o.proxy); reads.join(o.reads); inits.join(o.inits); }
  void clear() { seen.clear(); proxy.clear(); reads.clear(); inits.clear(); }
};

struct Mark {  // an access of a word: two machine words, since there are millions of them
  uint32_t statement = 0;  // in Module::statements
  uint32_t clock = 0, lanes = 0;
  uint16_t entity = 0;  // plus one; 0: none
  uint8_t bytes = 0;
  uint8_t strong : 1;   // atomic or volatile
  uint8_t async : 1;    // by the async proxy
  uint8_t more : 1;     // of Cell::read: there are further readers, a chain in Watch::readers_
  uint8_t mixed : 1;    // its lanes touched different bytes
  uint8_t : 4;
  Mark() : strong(0), async(0), more(0), mixed(0) {}
  void join(const Mark& o) {  // of the same entity and clock
    mixed = mixed || o.mixed || bytes != o.bytes;
    lanes |= o.lanes;
    bytes |= o.bytes;
  }
};
struct Cell { Mark write, read; };

struct JobEntity { uint32_t entity = 0, clock = 0; };

enum class Touch : uint8_t { read, write, strong_read, strong_write, atomic };

// Who accesses: `lanes` are recorded; what lanes of `own` did themselves lies before.
struct Lanes {
  uint32_t lanes, own;
  bool part = false;  // of a word: what lanes of `own` did to bytes of it, perhaps to others, lies before
  static Lanes one(int lane) { return {1u << lane, 1u << lane}; }
  static Lanes together() { return {0xFFFFFFFFu, 0}; }  // the warp as a whole: bytes of one lane reach others
  static Lanes each() { return {0xFFFFFFFFu, 0xFFFFFFFFu}; }
};

class Watch {
 public:
  Watch(uint32_t ctas, uint32_t warps_per_cta, uint32_t words, bool strict);
  // Accesses of threads.
  void touch(Ctx& c, Cta& cta, uint32_t offset, uint32_t bytes, Touch kind, Lanes who);
  // Asynchronous operations, begun by the warp of `c`.
  JobEntity begin(Ctx& c);
  JobEntity again(const JobEntity& job);  // the next operation of the same unit, which keeps its operations in order
  JobEntity copies(Ctx& c);               // of cp.async: the open group
  bool is_copy(const JobEntity& job) const { return job.entity < 2 * threads_.size(); }
  void close_copies(Warp& w) { ++threads_[entity_of(w)].copies; }
  uint32_t tensor_base() const { return words_ * 4; }  // tensor memory follows shared memory: 4 quarters of 512 columns
  class Access;  // of one operation: what was found to lie before is remembered from piece to piece
  void job_touch(Ctx& c, const JobEntity& job, Cta& cta, uint32_t offset, uint64_t bytes, bool write, bool async_proxy, uint32_t lanes);
  void finish(const JobEntity& job) { if (!is_copy(job)) free_.push_back(job.entity); }
  void acquire(Warp& w, uint32_t lanes, const JobEntity& job);  // lanes have waited for its end (of cp.async: one lane)
  void release_observed(const Warp& w, uint32_t lanes, Order& into) const;  // what asynchronous operations that lanes issue now can rely on
  void fence_job(Warp& w, uint32_t lanes, const JobEntity& job);  // relaxed arrivals tell of the job too, as far as the lanes know it to be over
  static void release_job(Order& into, const JobEntity& job) { into.seen.raise(job.entity, job.clock); into.proxy.raise(job.entity, job.clock); }
  // Synchronisation, by some lanes of a warp.
  void release(Warp& w, uint32_t lanes, Order& into);
  void release_relaxed(Warp& w, Order& into);  // only what an earlier fence has ordered
  void tell(const Warp& w, uint32_t lanes, Order& into) const;  // what lanes have learned, without what they did themselves
  void remote_arrival(Ctx& c, Cta& cta, Order& into);  // on an mbarrier of another CTA, which must not end before
  void init_fence(Warp& w);
  void acquire(Warp& w, uint32_t lanes, const Order& from);
  void fence(Warp& w, uint32_t lanes);
  void proxy_fence(Warp& w, uint32_t lanes);
  void warp_sync(Warp& w, uint32_t lanes);
  void gather_reads(Warp& w);                                        // all lanes have come here
  bool initialised(Warp& w, uint32_t entity, uint32_t clock) const;  // an mbarrier.init lies before
  uint32_t entity_of(const Warp& w) const;
  uint32_t clock_of(const Warp& w) { return now(threads_[entity_of(w)]); }
  void leave(Warp& w);              // a warp has exited
  std::string left_behind(Cta& cta);        // accesses from elsewhere that may come after the CTA's end; empty if none

 private:
  struct Partial { uint32_t lanes; Order order; };       // acquired by some lanes since all lanes met
  struct Waits {  // of one lane for its cp.async: up to which group, at which clock of the warp; the last few
    uint32_t copies[8] = {}, clock[8] = {}, next = 0, forgotten = 0;  // forgotten: earlier waits went so far
    void add(uint32_t group, uint32_t at) {
      forgotten = copies[next];
      copies[next] = group;
      clock[next] = at;
      next = (next + 1) % 8;
    }
    uint32_t first(uint32_t group) const {  // the clock of the first wait that went so far, 0 if there is none
      uint32_t found = 0;
      for (int i = 0; i < 8; ++i) if (copies[i] >= group && (!found || clock[i] < found)) found = clock[i];
      return found;
    }
  };
  struct Thread {
    Order order;
    std::vector<Partial> partial;
    uint32_t clock = 2;        // 1 stands for the start
    bool released = false;     // the clock ticks before the next access
    uint32_t init_fence = 1, reads = 0;
    Order fenced, pending;  // released by the next strong write; acquired at the next fence
    uint32_t copies = 1;       // the open group of cp.async
    Waits waits[32];
  };
  struct Remote { const Raw* raw; uint32_t clock, lanes; };
  static uint32_t now(Thread& t) {
    t.clock += t.released;
    t.released = false;
    return t.clock;
  }
  bool known(const Order& order, const Mark& m, uint32_t entity, uint32_t clock, uint32_t lanes, bool was_read) const;
  bool before(const Thread& me, uint32_t self, const Mark& m, Lanes who, bool was_read) const;
  bool proxy_knows(const Thread& me, const Mark& m) const;
  void view(const Warp& w, uint32_t lanes, Order& into) const;  // what these lanes know and did
  void reach(Ctx& c, const Cta& cta, uint32_t entity, uint32_t clock, uint32_t lanes, const char* what);  // another CTA's shared memory
  uint32_t together(uint32_t lanes) const { return strict_ ? lanes : 0xFFFFFFFFu; }
  struct Reader { Mark mark; int32_t next; };
  struct Cells {  // of a CTA
    Block storage, chains;
    uint32_t count = 0;
    Cell& at(uint32_t word) const { return reinterpret_cast<Cell*>(storage.data())[word]; }
    int32_t& more(uint32_t word) const { return reinterpret_cast<int32_t*>(chains.data())[word]; }  // where the read mark says so
  };
  void add_reader(Cells& all, uint32_t word, const Mark& mark, uint32_t superseded);
  void forget_readers(Cells& all, uint32_t word);
  const Mark* unordered_reader(const Cells& all, uint32_t word, const Mark& by, const Thread& me, uint32_t self, Lanes who, uint16_t except) const;
  [[noreturn]] void hazard(Ctx& c, const Cta& cta, uint32_t offset, uint64_t bytes, const char* what, const Mark& before, const char* did);
  std::string name(uint32_t entity) const;
  Cells& cells(const Cta& cta, uint32_t end);
  const Raw* statement(const Ctx& c, const Mark& m) const;
  uint32_t warps_;
  uint32_t words_;
  bool strict_;  // lanes of a warp are ordered by bar.warp.sync alone
  std::vector<Thread> threads_;
  std::vector<Cells> cells_;
  std::vector<Reader> readers_;
  int32_t spare_reader_ = -1;
  std::deque<uint32_t> free_;  // reused late, so that one operation is not taken for another
  std::vector<uint32_t> job_clock_;
  std::vector<uint32_t> job_maker_;
  std::unordered_map<uint64_t, Order> locations_;              // of strong accesses
  std::vector<std::unordered_map<uint32_t, Remote>> remote_;   // per CTA: entity -> last access from another CTA
  std::vector<Clock> gone_;                                    // per CTA: what its exited warps had seen
};

// The accesses of an asynchronous operation, issued by some lanes of the warp of `c`.
class Watch::Access {
 public:
  Access(Watch& watch, Ctx& c, const JobEntity& job, bool write, bool async_proxy, uint32_t lanes);
  void touch(Cta& cta, uint32_t offset, uint64_t bytes);

 private:
  bool ordered(const Mark& m, bool was_read) const { return (m.entity == mark_.entity && !copy_) || watch_.before(me_, self_, m, who_, was_read); }
  void forget_ordered(Cells& all, uint32_t word);
  void check_write(Cta& cta, uint32_t offset, uint64_t bytes, const Mark& m);
  Watch& watch_;
  Ctx& c_;
  const uint32_t self_;
  Thread& me_;
  const bool copy_, write_;
  const Lanes who_;
  Mark mark_, good_, good_read_;  // the latter were found to lie before; good_ of all lanes, if its whole warp did
};

}  // namespace dsv4::sim
