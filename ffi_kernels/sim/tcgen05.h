// Tensor memory of a CTA, and what the instructions of the fifth generation share.
#pragma once

#include "decode.h"
#include "layout.h"

namespace dsv4::sim {

constexpr uint32_t kTensorLanes = 128, kTensorColumns = 512;

struct TensorMemory {
  std::vector<uint32_t> words = std::vector<uint32_t>(kTensorLanes * kTensorColumns, 0xFDFDFDFD);  // [lane][column]
  std::map<uint32_t, uint32_t> allocated;  // first column -> columns
  bool relinquished = false;
  int group = 0;                           // .cta_group of the kernel's instructions, once there was one
  uint32_t last_columns = kTensorColumns;  // allocations do not grow
  uint64_t collective = 0;                 // alloc and dealloc of pairs: how many this CTA has come to
  uint32_t wanted = 0, granted_at = 0;     // columns of the alloc under way; what it was given
  bool granted = false;
  JobEntity pipe;                          // operations issued by this CTA follow each other: one entity for all of them
  std::map<uint32_t, JobEntity> moves[2];  // loads and stores by warp: an entity each, whose end wait::ld or wait::st waits for
  std::shared_ptr<JobState> last;          // the latest of them
  uint32_t& at(uint32_t lane, uint32_t column) { return words[lane * kTensorColumns + column]; }
};

TensorMemory& tensor_of(Cta& cta);
Cta& peer_of(Ctx& c);  // the other CTA of the pair
// Checks that columns are allocated; `what` names the operand.
void check_columns(Cta& cta, uint32_t first, uint32_t count, const char* what);
int decode_cta_group(Decode& d);  // 1 or 2
void same_group(Ctx& c, int group);  // all instructions of a kernel must name the same .cta_group
// Issues an operation of the CTA's pipe: it runs after the earlier ones.
void issue_tensor_op(Ctx& c, std::function<void(Ctx&)> run);
JobEntity next_tensor_entity(Ctx& c);
// Tensor memory in the hazard check: columns by quarters of lanes.
void touch_tensor(Ctx& c, Cta& cta, uint32_t lanes_from, uint32_t lanes, uint32_t column, uint32_t columns, bool write, const JobEntity* job);
MatrixLayout tensor_layout_of(uint64_t descriptor, bool k_major);  // tcgen05_copy.cpp
void decode_tensor_copy(Decode& d);
void decode_tensor_mma(Decode& d);  // tcgen05_mma.cpp

}  // namespace dsv4::sim
