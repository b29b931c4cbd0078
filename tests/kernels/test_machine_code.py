"""What the static report reads from assembly."""

from ultrarec.kernels import amdgcn
from ultrarec.kernels.machine_code import counts_of, tensor_loops

# Two loops over tiles, the first with an inner branch, and one without products; as Triton 3.7 writes them.
ASSEMBLY = """
	.text
kernel:                                 ; @kernel
; %bb.0:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
	v_mfma_f32_32x32x8_bf16 v[0:15], v[0:1], v[2:3], 0 ; before the loops
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	.loc	1 65 37
	buffer_load_dwordx4 v[36:39], v34, s[52:55], 0 offen
	s_waitcnt vmcnt(0)
	v_mfma_f32_32x32x8_bf16 v[0:15], v[0:1], v[2:3], v[0:15]
	v_mfma_f32_4x4x4_16b_f16 v[0:3], v[0:1], v[2:3], v[0:3]
	v_exp_f32_e32 v4, v4
	v_rcp_f32_e32 v4, v4
	s_cbranch_vccz .LBB0_3
; %bb.2:
	v_pk_fma_f32 v[4:5], v[4:5], v[4:5], v[4:5]
	v_cvt_pk_bf16_f32 v6, v4, v5
.LBB0_3:
	v_cndmask_b32_e32 v7, v4, v5, vcc
	s_add_i32 s8, s8, 1
	s_cbranch_scc1 .LBB0_1
.LBB0_4:
	ds_write_b128 v99, v[42:45]
	s_cbranch_scc1 .LBB0_4
.LBB0_5:
	v_mfma_f32_16x16x16_f16 v[0:3], v[0:1], v[2:3], v[0:3]
	s_cbranch_execnz .LBB0_5
	s_endpgm
	.amdhsa_next_free_vgpr 152
	.vgpr_count:     152
	.vgpr_spill_count: 3
	.private_segment_fixed_size: 16
"""


def test_loops_of_amd_assembly_are_those_with_matrix_instructions():
    interior, boundary = tensor_loops(amdgcn.program_of(ASSEMBLY))
    assert counts_of(interior) == {
        "tensor": 2, "special": 2, "sync": 1, "memory": 1, "float": 2, "integer": 1, "control": 3
    }  # fmt: skip
    assert counts_of(boundary) == {"tensor": 1, "control": 1}
    assert [x.multiply_adds for x in interior if x.kind == "tensor"] == [32 * 32 * 8, 4 * 4 * 4 * 16]
    assert sum(x.multiply_adds for x in boundary) == 16 * 16 * 16


def test_registers_and_what_was_spilled_are_read_from_the_notes_of_amd_assembly():
    usage = amdgcn.usage_of(ASSEMBLY)
    assert (usage.registers, usage.spilled) == (152, 3 + 16)
