// A warp: 32 lanes as fragments (pc, mask) of frames. Fragments that meet at one instruction merge; the deepest frame and
// the lowest pc go first, so that lanes reconverge as early as possible; blocked fragments let the others pass.
#include <algorithm>

#include "machine.h"

namespace dsv4::sim {
namespace {

void fill_builtins(Machine& m, Warp& w, Frame& frame) {
  const Cta& cta = *w.cta;
  const Cluster& cluster = *cta.cluster;
  const uint32_t* block = m.launch.block;
  const uint64_t size = uint64_t{m.cluster_dims[0]} * m.cluster_dims[1] * m.cluster_dims[2];
  for (const BuiltinSlot& b : frame.f->builtins) {
    for (uint32_t lane = 0; lane < 32; ++lane) {
      const uint32_t t = w.id * 32 + lane;
      uint64_t v = 0;
      const auto nth = [&](Builtin first) { return static_cast<int>(b.what) - static_cast<int>(first); };
      const auto in = [&](Builtin first) { return nth(first) >= 0 && nth(first) < 3; };
      if (in(Builtin::tid_x)) v = nth(Builtin::tid_x) == 0 ? t % block[0] : nth(Builtin::tid_x) == 1 ? t / block[0] % block[1] : t / block[0] / block[1];
      else if (in(Builtin::ntid_x)) v = block[nth(Builtin::ntid_x)];
      else if (in(Builtin::ctaid_x)) v = cta.id[nth(Builtin::ctaid_x)];
      else if (in(Builtin::nctaid_x)) v = m.launch.grid[nth(Builtin::nctaid_x)];
      else if (in(Builtin::clusterid_x)) v = cluster.id[nth(Builtin::clusterid_x)];
      else if (in(Builtin::nclusterid_x)) v = m.clusters[nth(Builtin::nclusterid_x)];
      else if (in(Builtin::cluster_ctaid_x)) v = cta.id[nth(Builtin::cluster_ctaid_x)] % m.cluster_dims[nth(Builtin::cluster_ctaid_x)];
      else if (in(Builtin::cluster_nctaid_x)) v = m.cluster_dims[nth(Builtin::cluster_nctaid_x)];
      else switch (b.what) {
        case Builtin::laneid: v = lane; break;
        case Builtin::warpid: v = w.id; break;
        case Builtin::nwarpid: v = 64; break;
        case Builtin::smid: v = (cluster.index * size + cta.rank) % 132; break;
        case Builtin::nsmid: v = 132; break;
        case Builtin::gridid: v = 1; break;
        case Builtin::lanemask_eq: v = 1u << lane; break;
        case Builtin::lanemask_lt: v = (1u << lane) - 1; break;
        case Builtin::lanemask_le: v = (2ull << lane) - 1; break;
        case Builtin::lanemask_gt: v = static_cast<uint32_t>(~((2ull << lane) - 1)); break;
        case Builtin::lanemask_ge: v = static_cast<uint32_t>(~((1u << lane) - 1)); break;
        case Builtin::cluster_ctarank: v = cta.rank; break;
        case Builtin::cluster_nctarank: v = size; break;
        case Builtin::is_explicit_cluster: v = size > 1 ? ~0u : 0; break;  // a predicate: a bit per lane
        case Builtin::total_smem_size: v = m.shared_bytes; break;
        case Builtin::aggr_smem_size: v = m.shared_bytes + 1024; break;
        case Builtin::dynamic_smem_size: v = m.launch.shared_bytes; break;
        case Builtin::static_shared: v = shared_window(cta); break;
        case Builtin::dynamic_shared: v = shared_window(cta) + m.dynamic_offset; break;
        case Builtin::local_base: v = frame.local_base; break;
        default: break;
      }
      v += static_cast<uint64_t>(b.add);
      if (b.wide) reinterpret_cast<uint64_t*>(frame.regs + b.slot)[lane] = v;
      else reinterpret_cast<uint32_t*>(frame.regs + b.slot)[lane] = static_cast<uint32_t>(v);
    }
  }
}

std::string where(const Warp& w, const Fragment& f) {
  const Function& fn = *f.frame->f;
  const Raw& raw = fn.statements[fn.code[f.pc].raw];
  return text_of("PTX line %u (%s): '%s'", raw.line, source_of(*fn.module, raw).c_str(), show(raw).c_str()) +
         text_of(" in CTA (%u,%u,%u) warp %u lanes 0x%08x", w.cta->id[0], w.cta->id[1], w.cta->id[2], w.id, f.mask);
}

void merge(Warp& w) {
  for (size_t i = 0; i < w.fragments.size(); ++i) {
    for (size_t j = w.fragments.size() - 1; j > i; --j) {
      Fragment &a = w.fragments[i], &b = w.fragments[j];
      if (a.frame != b.frame || a.pc != b.pc || a.token != b.token || a.token_what != b.token_what) continue;
      a.mask |= b.mask;
      a.blocked = false;
      w.fragments.erase(w.fragments.begin() + static_cast<long>(j));
    }
  }
}

int pick(Machine& m, Warp& w) {
  int best = -1;
  const bool stray = m.options.schedule == Options::random && w.fragments.size() > 1 && m.random() % 4 == 0;
  for (int i = 0; i < static_cast<int>(w.fragments.size()); ++i) {
    Fragment& f = w.fragments[i];
    if (f.blocked && f.epoch != m.epoch) f.blocked = false;
    if (f.blocked) continue;
    if (best < 0) { best = i; continue; }
    if (stray) { if (m.random() & 1) best = i; continue; }
    const Fragment& b = w.fragments[best];
    if (best == w.demoted || (i != w.demoted && (f.frame->depth > b.frame->depth ||
        (f.frame->depth == b.frame->depth && f.pc < b.pc)))) best = i;
  }
  w.demoted = -1;
  return best;
}

void enter(Machine& m, Warp& w, Fragment& f, const Instr& in, uint32_t mask) {
  const Function& callee = *static_cast<const Function*>(in.extra);
  if (!callee.error.empty()) fail("%s", callee.error.c_str());
  if (f.frame->depth >= 64) fail("calls are nested more than 64 deep");
  Frame* caller = f.frame;
  Frame* frame = nullptr;
  for (auto& candidate : w.frames) {
    if (candidate->lanes && candidate->f == &callee && candidate->parent == caller && candidate->return_pc == f.pc + 1) frame = candidate.get();
  }
  if (!frame) frame = make_frame(m, w, callee, caller);
  frame->return_pc = f.pc + 1;
  frame->lanes |= mask;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    for (size_t i = 0; i < callee.params.size(); ++i) {
      const Variable& p = callee.params[i];
      std::memcpy(frame->param(lane) + p.offset, caller->param(lane) + in.op[callee.returns.size() + i], p.size);
    }
  }
  f.frame = frame;
  f.pc = 0;
}

void leave(Warp& w, Fragment& f) {
  Frame* frame = f.frame;
  Frame* caller = frame->parent;
  const Instr& call = caller->f->code[frame->return_pc - 1];
  for (int lane = 0; lane < 32; ++lane) {
    if (!(f.mask >> lane & 1)) continue;
    for (size_t i = 0; i < frame->f->returns.size(); ++i) {
      const Variable& r = frame->f->returns[i];
      std::memcpy(caller->param(lane) + call.op[i], frame->param(lane) + r.offset, r.size);
    }
  }
  frame->lanes &= ~f.mask;
  f.pc = frame->return_pc;
  f.frame = caller;
  (void)w;
}

// Runs one fragment until it branches apart, meets another one, blocks, or its slice ends. Returns the instructions run.
uint32_t run_fragment(Machine& m, Warp& w, int index, uint32_t slice) {
  Fragment* f = &w.fragments[index];
  Ctx c{};
  c.machine = &m;
  c.warp = &w;
  c.cta = w.cta;
  const Instr* code = nullptr;
  uint32_t count = 0;
  const auto split = [&](uint32_t lanes, int32_t pc) {  // lanes leave this fragment and go on at pc
    Fragment g{f->frame, pc, lanes, false, 0, 0, 0, ""};
    f->mask &= ~lanes;
    w.fragments.push_back(g);
    f = &w.fragments[index];
  };
  bool enter_frame = true;
  while (count < slice) {
    if (enter_frame) {
      c.frame = f->frame;
      c.regs = f->frame->regs;
      c.constants = f->frame->f->constants.data();
      code = f->frame->f->code.data();
      enter_frame = false;
    }
    // Others in this frame further down: stop there to merge.
    int32_t limit = INT32_MAX;
    if (w.fragments.size() > 1) {
      for (const Fragment& g : w.fragments) if (&g != f && g.frame == f->frame && g.pc > f->pc) limit = std::min(limit, g.pc);
    }
    int32_t pc = f->pc;
    const uint32_t mask = f->mask;
    Step step = Step::next;
    const Instr* in = nullptr;
    c.fragment = f;
    do {
      in = code + pc;
      c.mask = mask;
      if (in->guard >= 0) {
        const uint32_t p = *reinterpret_cast<const uint32_t*>(c.regs + in->guard);
        c.mask &= in->guard_not ? ~p : p;
        if (!c.mask) { ++pc; continue; }
      }
      f->pc = pc;
      ++count;
      step = in->run(c, *in);
      if (step != Step::next) break;
      ++pc;
    } while (pc < limit && count < slice);
    if (step == Step::next) {
      f->pc = pc;
      if (pc >= limit) break;
      continue;
    }
    switch (step) {
      case Step::jump: {
        const uint32_t taken = c.blocked;
        if (c.stay) {
          split(c.stay, f->pc);
          c.stay = 0;
          const uint32_t rest = f->mask & ~taken;
          if (rest) split(rest, f->pc + 1);
          f->pc = c.target;
          m.instructions += count;
          return count;
        }
        if (taken == mask) f->pc = c.target;
        else if (taken) {
          split(taken, c.target);
          ++f->pc;
          m.instructions += count;
          return count;
        } else ++f->pc;
        if (w.fragments.size() > 1) { m.instructions += count; return count; }
        break;
      }
      case Step::block: {
        const uint32_t stay = c.blocked, go = mask & ~stay;
        if (go) split(go, f->pc + 1);
        f->blocked = true;
        f->epoch = m.epoch;
        f->why = c.why;
        m.instructions += count;
        return count - (go == 0);
      }
      case Step::yield:
        ++f->pc;
        if (c.mask != mask) {}
        w.demoted = index;
        m.instructions += count;
        return count;
      case Step::call:
        if (c.mask != mask) split(mask & ~c.mask, f->pc + 1);
        enter(m, w, *f, *in, c.mask);
        enter_frame = true;
        if (w.fragments.size() > 1) { m.instructions += count; return count; }
        break;
      case Step::ret:
      case Step::exit: {
        if (c.mask != mask) split(mask & ~c.mask, f->pc + 1);
        if (step == Step::ret && f->frame->parent) {
          leave(w, *f);
          enter_frame = true;
          if (w.fragments.size() > 1) { m.instructions += count; return count; }
          break;
        }
        const uint32_t gone = f->mask;
        for (Frame* frame = f->frame; frame; frame = frame->parent) frame->lanes &= ~gone;
        w.fragments.erase(w.fragments.begin() + index);
        m.instructions += count;
        exit_lanes(m, w, gone);
        return count;
      }
      case Step::next: break;
    }
  }
  m.instructions += count;
  w.demoted = count >= slice ? index : -1;
  return count;
}

}  // namespace

Frame* make_frame(Machine& m, Warp& w, const Function& f, Frame* parent) {
  Frame* frame = nullptr;
  for (auto& free : w.frames) if (!free->lanes && free->f == &f) frame = free.get();
  if (!frame) {
    w.frames.push_back(std::make_unique<Frame>());
    frame = w.frames.back().get();
    frame->storage = Block(f.register_bytes + 64);
    frame->regs = frame->storage.data();
    frame->params.resize(f.param_bytes * 32 + 1);
    frame->f = &f;
  }
  std::memset(frame->regs, kPoison, f.register_bytes);
  std::memset(frame->params.data(), kPoison, frame->params.size());
  frame->parent = parent;
  frame->depth = parent ? parent->depth + 1 : 0;
  frame->lanes = 0;
  frame->local_base = parent ? parent->local_base + (parent->f->local_bytes + 15) / 16 * 16 : 16;
  if (frame->local_base + f.local_bytes > w.local_stride) fail("local memory is exhausted by recursion");
  fill_builtins(m, w, *frame);
  return frame;
}

void start_warp(Warp& w, uint32_t lanes, const Machine& machine) {
  w.live = lanes;
  w.local_stride = machine.kernel.local_chain + 32;
  w.local.assign(w.local_stride * 32, kPoison);
  Frame* frame = make_frame(const_cast<Machine&>(machine), w, machine.kernel, nullptr);
  frame->lanes = lanes;
  w.fragments.push_back({frame, 0, lanes, false, 0, 0, 0, ""});
}

bool run_warp(Machine& m, Warp& w, uint32_t slice) {
  uint32_t count = 0;
  bool moved = false;
  while (count < slice && !w.fragments.empty()) {
    const int index = pick(m, w);
    if (index < 0) break;
    Fragment at = w.fragments[index];
    try {
      const uint32_t n = run_fragment(m, w, index, slice - count);
      moved |= n > 0;
      count += n ? n : 1;
    } catch (const Error& e) {
      if (index < static_cast<int>(w.fragments.size())) at = w.fragments[index];
      fail("Kernel %s: %s. At %s.", m.kernel.name.c_str(), e.text.c_str(), where(w, at).c_str());
    }
    if (w.fragments.size() > 1) merge(w);
    if (w.demoted >= static_cast<int>(w.fragments.size())) w.demoted = -1;
  }
  return moved;
}

bool gathered(Ctx& c, uint32_t need) {
  if (need & ~c.warp->live) fail("the member mask 0x%08x names lanes 0x%08x that have exited or do not exist", need, need & ~c.warp->live);
  if (!(need & ~c.mask)) return true;
  c.blocked = c.mask;
  c.why = "the other lanes of the mask";
  return false;
}

std::string dump(const Machine& m) {
  std::string s;
  size_t lines = 0;
  for (const auto& cluster : m.resident) {
    for (const auto& cta : cluster->ctas) {
      for (int b = 0; b < 16; ++b) {
        const Barrier& bar = cta->barriers[b];
        if (bar.arrived) s += text_of("\n  CTA (%u,%u,%u) barrier %d: %u of %u threads have arrived", cta->id[0], cta->id[1], cta->id[2], b, bar.arrived, bar.expected);
      }
      for (const auto& [at, b] : cta->mbarriers) {
        s += text_of("\n  CTA (%u,%u,%u) mbarrier at shared 0x%x: phase %llu (parity %llu), pending arrivals %u of %u, pending bytes %lld", cta->id[0],
                     cta->id[1], cta->id[2], at, static_cast<unsigned long long>(b.phase), static_cast<unsigned long long>(b.phase & 1), b.pending, b.expected,
                     static_cast<long long>(b.tx));
      }
      for (const auto& w : cta->warps) {
        for (const Fragment& f : w->fragments) {
          if (++lines <= 96) s += "\n  " + where(*w, f) + (f.blocked ? std::string(" waits for ") + f.why : std::string(" runs"));
        }
      }
    }
    if (cluster->arrived) s += text_of("\n  cluster (%u,%u,%u): %u of %u threads have arrived at its barrier", cluster->id[0], cluster->id[1], cluster->id[2], cluster->arrived, cluster->live_threads);
  }
  if (lines > 96) s += text_of("\n  and %zu more fragments", lines - 96);
  return s;
}

}  // namespace dsv4::sim
