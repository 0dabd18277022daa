// The happens-before check of a cluster's shared memory: vector clocks of warps and of asynchronous operations.
// A warp's clock ticks when it releases (barrier, arrival, fence); an access is ordered after another one if the warp has
// acquired, directly or through others, what the other's clock said at the time. Two unordered accesses of one word of
// shared memory, one of them a write, are a hazard, whatever the schedule made of them. An asynchronous operation is an
// entity of its own: its accesses count from its issue, and end for whoever waits for its group or its mbarrier.
// A second clock says which writes of threads the async proxy may see (fence.proxy.async).
// Within a warp, lanes exchange data only across bar.warp.sync and the like: a counter per warp tells.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace dsv4::sim {

struct Ctx;
struct Cta;
struct Raw;
struct Warp;

class Clock {
 public:
  uint32_t at(uint32_t e) const { return e < v_.size() ? v_[e] : 0; }
  void raise(uint32_t e, uint32_t c) {
    if (e >= v_.size()) v_.resize(e + 1, 0);
    if (v_[e] < c) v_[e] = c;
  }
  void join(const Clock& o) {
    if (o.v_.size() > v_.size()) v_.resize(o.v_.size(), 0);
    for (size_t i = 0; i < o.v_.size(); ++i) if (v_[i] < o.v_[i]) v_[i] = o.v_[i];
  }
  void set(uint32_t e, uint32_t c) { raise(e, c); v_[e] = c; }
  void clear() { v_.clear(); }

 private:
  std::vector<uint32_t> v_;
};

struct Order {  // what a synchronising object carries
  Clock seen, proxy;
  Clock inits;  // like `seen`, but for mbarrier.init and the start of a CTA alone: relaxed arrivals carry it too
  void join(const Order& o) { seen.join(o.seen); proxy.join(o.proxy); inits.join(o.inits); }
  void clear() { seen.clear(); proxy.clear(); inits.clear(); }
};

struct Mark {  // an access of a word
  const Raw* raw = nullptr;
  uint32_t clock = 0, sync = 0;
  uint16_t entity = 0;  // plus one; 0: none
  uint8_t lane = 0;     // 32: several
  uint8_t bytes : 4;
  uint8_t strong : 1;   // atomic or volatile
  uint8_t async : 1;    // by the async proxy
  Mark() : bytes(0), strong(0), async(0) {}
};
struct Cell {
  Mark write, read;
  int32_t more = -1;  // further readers
};

struct JobEntity { uint32_t entity = 0, clock = 0; };

enum class Touch : uint8_t { read, write, strong_read, strong_write, atomic };

class Watch {
 public:
  Watch(uint32_t ctas, uint32_t warps_per_cta, uint32_t words, bool strict);
  // Accesses of threads.
  void touch(Ctx& c, Cta& cta, uint32_t offset, uint32_t bytes, Touch kind, int lane);
  // Asynchronous operations: begun by the warp of `c`; async_proxy is false for cp.async (not bulk).
  JobEntity begin(Ctx& c);
  JobEntity again(const JobEntity& job);  // the next operation of the same unit, which keeps its operations in order
  uint32_t tensor_base() const { return words_ * 4; }  // tensor memory follows shared memory: 4 quarters of 512 columns
  void job_touch(Ctx& c, const JobEntity& job, Cta& cta, uint32_t offset, uint64_t bytes, bool write, bool async_proxy);
  void finish(const JobEntity& job) { free_.push_back(job.entity); }
  void acquire(Warp& w, const JobEntity& job);
  void release_observed(Warp& w, Order& into);  // what asynchronous operations that the warp issues now can rely on
  void fence_job(Warp& w, const JobEntity& job);  // relaxed arrivals tell of the job too, as far as the warp knows it to be over
  static void release_job(Order& into, const JobEntity& job) { into.seen.raise(job.entity, job.clock); into.proxy.raise(job.entity, job.clock); }
  // Synchronisation of warps.
  void release(Warp& w, Order& into);
  void release_relaxed(Warp& w, Order& into);  // only what an earlier fence has ordered
  void remote_arrival(Ctx& c, Cta& cta, Order& into);  // on an mbarrier of another CTA, which must not end before
  void init_fence(Warp& w);
  void acquire(Warp& w, const Order& from);
  void fence(Warp& w);
  void proxy_fence(Warp& w);
  void warp_sync(Warp& w);
  bool initialised(Warp& w, uint32_t entity, uint32_t clock) const;  // an mbarrier.init lies before
  uint32_t entity_of(const Warp& w) const;
  uint32_t clock_of(const Warp& w) const { return threads_[entity_of(w)].clock; }
  void leave(Warp& w);              // a warp has exited
  std::string left_behind(Cta& cta);        // accesses from elsewhere that may come after the CTA's end; empty if none

 private:
  struct Thread {
    Order order;
    uint32_t clock = 2, sync = 0;  // 1 stands for the start
    uint32_t init_fence = 1;
    Order fenced, pending;  // released by the next strong write; acquired at the next fence
  };
  struct Remote { const Raw* raw; uint32_t clock; };
  [[noreturn]] void hazard(Ctx& c, const Cta& cta, uint32_t offset, uint32_t bytes, const char* what, const Mark& before, const char* did, const char* why);
  std::string name(uint32_t entity) const;
  Cell& cell(const Cta& cta, uint32_t word);
  void reach(Ctx& c, const Cta& cta, uint32_t entity, uint32_t clock, const char* what);  // another CTA's shared memory
  uint32_t warps_;
  uint32_t words_;
  bool strict_;  // lanes of a warp are ordered by bar.warp.sync alone
  std::vector<Thread> threads_;
  std::vector<std::vector<Cell>> cells_;
  std::vector<std::vector<Mark>> readers_;
  std::vector<int32_t> spare_readers_;
  std::deque<uint32_t> free_;  // reused late, so that one operation is not taken for another
  std::vector<uint32_t> job_clock_;
  std::vector<std::string> job_name_;
  std::unordered_map<uint64_t, Order> locations_;              // of strong accesses
  std::vector<std::unordered_map<uint32_t, Remote>> remote_;   // per CTA: entity -> last access from another CTA
  std::vector<Clock> gone_;                                    // per CTA: what its exited warps had seen
};

}  // namespace dsv4::sim
