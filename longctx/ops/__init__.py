"""Pure functions on arrays: the mathematics of every layer, without parameters, Flax or mesh.

causal_conv    y_t = sum_w kernel[-1-w] x_{t-w}                      state: the last W-1 tokens
linear_scan    s_t = a_t s_{t-1} + x_t                               state: a vector, real or complex
selective_scan h_t = exp(delta_t A) h_{t-1} + delta_t x_t b_t^T      state: N numbers per channel
gated_linear   S_t = Diag(a_t) S_{t-1} + k_t v_t^T                   state: a matrix, elementwise decay
gated_delta    S_t = (I - beta_t k_t k_t^T) Diag(a_t) S_{t-1} + beta_t k_t v_t^T     state: a matrix, dense decay
mlstm          C_t = f_t C_{t-1} + i_t k_t v_t^T, exponential i_t         state: a matrix, a vector and a scale
feature_maps   phi of linear attention, phi(q).phi(k) in place of exp(q.k)
slstm          c_t = f_t c_{t-1} + i_t z_t, gates of h_{t-1} too     state: four vectors, which do not compose
inplace_ttt    W <- W + sum z_s^T v_s once every C tokens            state: a matrix, and the sum in progress
ttt_linear     a linear model with a norm, trained as it reads       state: its weights, and the gradients in progress
titans         an MLP trained with momentum and forgetting           state: its weights, twice, and the momentum
titans_context attention in a segment, and to what titans recalls    state: that of titans, and C tokens
lact           a gated MLP trained on large chunks                   state: its weights, and the gradients in progress
gated_delta_product    n such steps per token                      state: a matrix, dense decay
diagonal_low_rank      S_t = (Diag(w_t) + b_t a_t^T) S_{t-1} + k_t v_t^T            state: a matrix, dense decay
log_linear     gated_linear or gated_delta, a matrix per scale of the past          state: a matrix per scale
levels         sums over nodes of c^l tokens, R a level              state: L R sums
h_transformer  softmax over near tokens and means of 2^l far ones    state: that of levels
pyramid        softmax over near tokens and weighted means of c^l older      state: that of levels
resolution     one token for every c of a document, and back         state: what the last of them gives
attention      softmax over the keys that a pattern shows            state: all tokens, or the last W
moba           softmax over the blocks whose mean key scores highest  state: all tokens
nsa            softmax over pooled blocks, the best of them, and a window           state: all tokens
indexer_topk   softmax over the tokens that an indexer scores highest               state: all tokens
lsh            softmax over the keys of the query's own bucket       state: all tokens
cope           softmax with positions that count the tokens between  state: all tokens
infini         y_t = M^T f(q_t) / z.f(q_t), M and z of the segments before t's own     state: a matrix twice
infini_delta   the same, M written with what it does not hold yet              state: a matrix twice
block_recurrent  R vectors that attend to each other and to a block of W tokens     state: they, and W tokens
path_attention softmax of q_i^T H_i ... H_{j+1} k_j, H_t = I - beta_t w_t w_t^T     state: all tokens
patterns       which keys a query may see
positions      how fast queries and keys rotate by their positions, `rotary` how; biases: what is added to logits
blockwise      attention by blocks of queries and keys; thinned: the same in another order of tokens; routed: to chosen
               blocks (key_blocks); partial: how attentions to parts of the keys merge
minibatch      what the fast forms of ttt_linear, titans, titans_context, lact and infini_delta share; chunks: rows cut
               into pieces; clock: decay between the tokens of a chunk; products: of matrices, in float32
cross_entropy  the loss of a row, its logits never held whole

A family that layers call is one object of its module, a `Recurrence` or `Keyed` of `family.py`; `FAMILIES` has all:

    y, state = GATED_DELTA(q, k, v, beta, log_decay)
    y = MOBA((q,), (k, v), block=512, count=3).y
"""

from longctx.ops.attention import ATTENTION
from longctx.ops.block_recurrent import BLOCK_RECURRENT
from longctx.ops.causal_conv import CAUSAL_CONV
from longctx.ops.cope import COPE
from longctx.ops.diagonal_low_rank import DIAGONAL_LOW_RANK
from longctx.ops.gated_delta import GATED_DELTA
from longctx.ops.gated_delta_product import GATED_DELTA_PRODUCT
from longctx.ops.gated_linear import GATED_LINEAR
from longctx.ops.h_transformer import H_TRANSFORMER
from longctx.ops.indexer_topk import INDEXER_TOPK
from longctx.ops.infini import INFINI
from longctx.ops.infini_delta import INFINI_DELTA
from longctx.ops.inplace_ttt import INPLACE_TTT
from longctx.ops.lact import LACT
from longctx.ops.linear_scan import LINEAR_SCAN
from longctx.ops.log_linear import LOG_LINEAR
from longctx.ops.lsh import LSH
from longctx.ops.mlstm import MLSTM
from longctx.ops.moba import MOBA
from longctx.ops.nsa import NSA
from longctx.ops.path_attention import PATH
from longctx.ops.pyramid import PYRAMID
from longctx.ops.selective_scan import SELECTIVE_SCAN
from longctx.ops.slstm import SLSTM
from longctx.ops.titans import TITANS
from longctx.ops.titans_context import TITANS_CONTEXT
from longctx.ops.ttt_linear import TTT_LINEAR

_KEYED = ATTENTION, COPE, INDEXER_TOPK, LSH, MOBA, NSA, PATH
_RECURRENCES = (
    BLOCK_RECURRENT,
    CAUSAL_CONV,
    DIAGONAL_LOW_RANK,
    GATED_DELTA,
    GATED_DELTA_PRODUCT,
    GATED_LINEAR,
    H_TRANSFORMER,
    INFINI,
    INFINI_DELTA,
    INPLACE_TTT,
    LACT,
    LINEAR_SCAN,
    LOG_LINEAR,
    MLSTM,
    PYRAMID,
    SELECTIVE_SCAN,
    SLSTM,
    TITANS,
    TITANS_CONTEXT,
    TTT_LINEAR,
)
FAMILIES = {family.name: family for family in (*_KEYED, *_RECURRENCES)}
