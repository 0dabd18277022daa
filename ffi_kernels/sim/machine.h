// The machine while it runs: frames, fragments, warps, CTAs, clusters, and what handlers of instructions see of them.
#pragma once

#include <cstring>
#include <deque>
#include <functional>
#include <map>

#include "blocks.h"
#include "global_watch.h"
#include "hazards.h"
#include "launch.h"
#include "module.h"

namespace dsv4::sim {

constexpr uint32_t kSharedBase = 0x400;  // as on the device: the first KiB of the window is reserved
constexpr uint64_t kSharedWindow = 0x4000000000000000, kLocalWindow = 0x5000000000000000, kParamWindow = 0x6000000000000000;
constexpr uint64_t kWindowMask = 0xF000000000000000;
constexpr uint32_t kAll = 0xFFFFFFFFu;
constexpr uint8_t kPoison = 0xFF;  // a nan in every floating point format, an address that exists nowhere

struct Machine;
struct Cluster;
struct Cta;
struct Warp;

struct Frame {
  const Function* f = nullptr;
  Frame* parent = nullptr;
  int depth = 0;
  int32_t return_pc = 0;
  uint32_t lanes = 0;
  uint64_t local_base = 0;
  Block storage;  // registers
  uint8_t* regs = nullptr;
  std::vector<uint8_t> params;    // [lane][param_bytes]
  uint8_t* param(int lane) { return params.data() + static_cast<size_t>(lane) * f->param_bytes; }
};

struct Fragment {  // lanes of a warp that stand at the same instruction
  Frame* frame;
  int32_t pc;
  uint32_t mask;
  bool blocked = false;
  uint64_t epoch = 0;      // of the machine when it blocked
  uint64_t token = 0;      // an arrival already made at this instruction
  uint64_t token_what = 0;
  const char* why = "";
};

struct Ctx {  // what a handler sees
  uint8_t* regs;
  const uint8_t* constants;
  uint32_t mask;      // lanes that execute
  uint32_t blocked;   // Step::block: lanes that must try again; Step::jump: lanes that jump
  uint32_t stay;      // Step::jump: lanes that execute the instruction again
  int32_t target;
  Warp* warp;
  Cta* cta;
  Machine* machine;
  Frame* frame;
  Fragment* fragment;
  const char* why;    // Step::block: what is waited for
  const Raw* statement;  // for the hazard checks, see `note`
  const Raw& raw(const Instr& in) const { return frame->f->statements[in.raw]; }
};

struct Barrier {
  uint32_t arrived = 0, expected = 0;
  uint64_t generation = 0;
  uint32_t reduction[3] = {0, 0, 0};  // popc, and, or of the running generation
  uint32_t result[3] = {0, 0, 0};     // of the last one
  Order next, done;
};

struct Mbarrier {
  uint32_t expected = 0, pending = 0;  // arrivals
  int64_t tx = 0;
  uint64_t phase = 0;  // completed phases
  Order next, done;    // of the running phase; of the completed ones
  uint32_t maker = 0, made = 0;  // entity and clock of mbarrier.init
  bool fenced = false;           // fence.mbarrier_init or fence.proxy.async since
};

struct JobState {  // an asynchronous operation, as its groups see it
  bool done = false;
  JobEntity entity;
};
struct Product : JobState {  // of wgmma: done when the parts of all warps of the group are
  int left = 0, unissued = 0;
  Order met;  // what came before it in the warps that have issued it
};
struct Groups {  // of a warp: cp.async, cp.async.bulk or wgmma. Each lane has groups of its own; mostly all lanes have the same
  struct Member {
    std::shared_ptr<JobState> job;  // null: done
    JobEntity entity;
    uint32_t lanes;
  };
  struct Group {
    std::vector<Member> members;
    uint32_t lanes;  // that have not waited for it yet
  };
  std::vector<Member> open;
  std::vector<Group> committed;
};
struct Job {
  std::function<void(Ctx&)> run;
  std::function<bool()> ready;  // empty: always
  Warp* warp;
  const Raw* raw;
};

struct Flight {  // a wgmma product that has not been waited for, and the registers it works on
  const uint8_t* regs;
  const Instr* in;
  int d_regs, a_regs;
  std::shared_ptr<JobState> job;
  std::vector<int32_t> copies;  // slots that D was copied to since
};

struct Warp {
  Cta* cta = nullptr;
  uint32_t id = 0, live = 0;
  std::vector<Fragment> fragments;
  std::vector<std::unique_ptr<Frame>> frames;
  std::vector<uint8_t> local;
  uint64_t local_stride = 0;
  uint64_t cluster_token[32] = {};    // generation of the cluster barrier that a lane arrived at, plus one
  Groups copies, bulk, products;
  std::shared_ptr<JobState> last_product;
  std::vector<Flight> flights;
  uint64_t product_count = 0;
  uint32_t waited = 0;                // lanes that executed griddepcontrol.wait
  int demoted = -1;
  bool done() const { return fragments.empty(); }
};

struct Cta {
  Cluster* cluster = nullptr;
  uint32_t rank = 0, id[3] = {0, 0, 0}, live_threads = 0;
  Block storage;
  uint8_t* shared = nullptr;  // address kSharedBase
  uint32_t shared_bytes = 0;
  std::vector<std::unique_ptr<Warp>> warps;
  Barrier barriers[16];
  std::map<uint32_t, Mbarrier> mbarriers;  // by offset in the window
  std::map<std::pair<uint32_t, uint64_t>, std::shared_ptr<Product>> products;  // by warpgroup and number: not issued by all warps
  bool launches_over = false;              // it knows that no cluster is left to be canceled
  std::shared_ptr<void> tensor;            // TensorMemory, see tcgen05.h
};

struct Cluster {
  Machine* machine = nullptr;
  uint32_t id[3] = {0, 0, 0};
  std::vector<std::unique_ptr<Cta>> ctas;
  uint32_t live_threads = 0, arrived = 0;
  uint64_t generation = 0;
  uint64_t index = 0;
  Order next, done;
  std::unique_ptr<Watch> watch;  // null: no hazard checks
  std::vector<Job> jobs;         // not yet carried out
};

struct Region {
  uint64_t low, high;
  bool writable;
  bool settled;  // Memory::settled
};

struct Options {
  enum Schedule { eager, lazy, random } schedule = eager;
  uint64_t seed = 0;
  uint64_t limit = uint64_t{1} << 33;  // warp instructions
  bool checks = true, statistics = false;
  bool strict = true;  // false: also what devices are known to do although the ISA does not promise it
};

extern thread_local uint64_t last_instructions;  // launch.cpp: warp instructions of this thread's last launch

struct Machine {
  const Launch& launch;
  const Module& module;
  const Function& kernel;
  Options options;
  std::vector<Region> regions;  // sorted
  size_t last_region = 0;
  uint32_t static_shared = 0, dynamic_offset = 0, shared_bytes = 0;
  uint32_t cluster_dims[3], clusters[3];
  uint64_t epoch = 1;         // counts events that may free a fragment
  uint64_t instructions = 0, progress = 0, events = 0;
  bool expire = false;        // try_wait gives up instead of blocking
  std::vector<std::unique_ptr<Cluster>> resident;
  struct Turn { Warp* warp; uint64_t priority, idle; };  // idle: the epoch in which it could not move
  std::vector<Turn> turns;    // of random schedules: all resident warps
  std::vector<uint32_t> queue;  // of one step: those that may move, a heap
  void rank();                // schedule.cpp: makes `turns` anew
  uint64_t next_cluster = 0, total_clusters = 0;
  bool waited = false;        // griddepcontrol.wait, any thread

  Machine(const Launch& l, const Module& m, const Function& k, const Options& o) : launch(l), module(m), kernel(k), options(o) {}
  uint64_t random_state = 0;
  std::unique_ptr<GlobalWatch> global_watch;  // null: no checks, or one cluster only
  uint32_t random();  // schedule.cpp
  void prepare();     // launch.cpp: validates the launch
  void run();         // schedule.cpp
  void event() { ++epoch; ++events; progress = instructions; }
};

// warp.cpp
void start_warp(Warp& warp, uint32_t lanes, const Machine& machine);
bool run_warp(Machine& machine, Warp& warp, uint32_t slice);  // true if anything moved
std::string dump(const Machine& machine);                     // every warp and barrier, for a deadlock
Frame* make_frame(Machine& machine, Warp& warp, const Function& f, Frame* parent);
void exit_lanes(Machine& machine, Warp& warp, uint32_t lanes);  // sync.cpp: barriers learn of exits
bool gathered(Ctx& c, uint32_t need);  // all lanes of `need` execute this instruction together; else blocks

void check_tensor_freed(Cta& cta);  // tcgen05.cpp: at the end of the CTA

// address.cpp. Each returns host memory, or throws a sentence. `bytes` must be naturally aligned.
enum class Access : uint8_t { read, write, both };
// `early`: the launch before may still run, so that only what it does not write can be read, see starts_early.
uint8_t* global_at(Machine& m, uint64_t address, uint64_t bytes, uint64_t align, Access access, bool early);
bool starts_early(const Ctx& c, int lane);  // the lane has not waited for the launch before this one
uint8_t* shared_at(Ctx& c, uint64_t address, uint64_t bytes, uint64_t align, Access access, Space space);
uint8_t* local_at(Ctx& c, uint64_t address, uint64_t bytes, uint64_t align, int lane);
uint8_t* resolve(Ctx& c, Space space, uint64_t address, uint64_t bytes, uint64_t align, Access access, int lane);
Cta& cta_of(Ctx& c, uint64_t shared_address);  // of the cluster
inline uint32_t shared_window(const Cta& cta) { return (cta.rank << 24) + kSharedBase; }

// schedule.cpp: carries `run` out now (eager) or later. `state` is marked done afterwards.
inline bool eager(const Ctx& c) { return c.machine->options.schedule == Options::eager; }
void submit(Ctx& c, std::shared_ptr<JobState> state, std::function<void(Ctx&)> run, std::function<bool()> ready = {});
// groups.cpp
void commit_group(Ctx& c, Groups& groups);
// Waits for all but the last `but` groups of each lane.
Step wait_groups(Ctx& c, Groups& groups, uint32_t but, const char* why);

inline Watch* watch_of(const Cta& cta) { return cta.cluster->watch.get(); }
// An access of a thread, for the hazard checks; `value`: what a write is about to store.
void touch_memory(Ctx& c, const Instr& in, Space space, uint64_t address, uint64_t bytes, Touch kind, Lanes who, const void* value = nullptr);
void fence_all(Ctx& c);  // sync.cpp: a fence, for the hazard checks
inline void gathered_reads(Ctx& c) { if (Watch* watch = watch_of(*c.cta)) watch->gather_reads(*c.warp); }  // all lanes are here
inline void note(Ctx& c, const Instr& in) { c.statement = &c.raw(in); }

// mbarrier.cpp. The state lives beside the memory, which holds a mark that tells if something writes over it.
uint32_t shared_offset(uint64_t address);  // in the window, of a shared or generic address; with the rank of the CTA
Mbarrier& mbarrier_at(Ctx& c, uint64_t address, Space space);
void mbarrier_arrive(Machine& m, Mbarrier& b, uint32_t count);
void mbarrier_tx(Machine& m, Mbarrier& b, int64_t bytes);  // positive: expect; negative: complete

// Registers and constants.
template <class T>
inline T* out(Ctx& c, const Instr& in, int i) { return reinterpret_cast<T*>(c.regs + in.op[i]); }
template <class T>
inline const T* src(Ctx& c, const Instr& in, int i) {
  const int32_t slot = in.op[i];
  return reinterpret_cast<const T*>(slot >= 0 ? c.regs + slot : c.constants + ~slot);
}
inline uint32_t pred(Ctx& c, const Instr& in, int i) { return *src<uint32_t>(c, in, i); }
template <class T>
inline void put(T* dst, const T* value, uint32_t mask) {
  if (mask == kAll) std::memcpy(dst, value, 32 * sizeof(T));
  else for (int l = 0; l < 32; ++l) dst[l] = mask >> l & 1 ? value[l] : dst[l];
}
inline void put_pred(Ctx& c, const Instr& in, int i, uint32_t value) {
  uint32_t& p = *out<uint32_t>(c, in, i);
  p = (p & ~c.mask) | (value & c.mask);
}
inline uint64_t address(Ctx& c, const Instr& in, int i, bool wide, int lane) {
  return wide ? src<uint64_t>(c, in, i)[lane] : src<uint32_t>(c, in, i)[lane];
}
// The same with an offset; 32-bit addresses wrap.
inline uint64_t where(Ctx& c, const Instr& in, int i, bool wide, int64_t offset, int lane) {
  const uint64_t a = address(c, in, i, wide, lane) + static_cast<uint64_t>(offset);
  return wide ? a : static_cast<uint32_t>(a);
}

}  // namespace dsv4::sim
