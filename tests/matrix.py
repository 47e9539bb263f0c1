"""Every family x head x mixer: converted, trained two steps, saved, loaded in another process, compared

`python tests/matrix.py` checks all of them and writes tests/matrix.csv, matrix.md, and matrix.json about the run (ten minutes);
test_matrix.py checks one case of each family in CI, and all with CALD_SLOW=1."""
import argparse, copy, itertools, json, os, subprocess, sys, tempfile, time, warnings
from pathlib import Path

import pandas as pd, torch, torch.nn.functional as F, transformers
from safetensors.torch import save_file
from transformers import DynamicCache

import cald
from cald.convert import convert
from cald.lab.results import to_markdown
from cald.lab.store import device_name,environment,git_state
from cald.models import FAMILIES,MIXERS

root = Path(__file__).parents[1]

# ---- small models with random weights

wide = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, initializer_range=0.2)
tokens = dict(wide, vocab_size=60, max_position_embeddings=44, pad_token_id=1, bos_token_id=0, eos_token_id=2)
waves = dict(wide, vocab_size=12, conv_dim=(16,)*7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=4, feat_extract_norm='layer',
             do_stable_layer_norm=True, tdnn_dim=(16,16,16), tdnn_kernel=(3,2,1), tdnn_dilation=(1,1,1), xvector_output_dim=8, classifier_proj_size=16)
pictures = dict(wide, image_size=32, patch_size=8)
named = dict(vocab_size=60, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=3)
halves = dict(named, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=2, encoder_ffn_dim=48,
              decoder_ffn_dim=48, init_std=0.2)
sliding = dict(head_dim=16, sliding_window=8) # narrower than the texts
SIZES = { # family: fields of its configuration; None: it has no such field
    'data2vec-audio':dict(feat_extract_norm=None, do_stable_layer_norm=None, conv_pos_kernel_size=3, num_conv_pos_embeddings=2),
    'sew':dict(squeeze_factor=2, conv_stride=(5,2,2,2,2,2,2), conv_kernel=(10,3,3,3,3,2,2)),
    'wav2vec2-bert':dict(feature_projection_input_dim=20, conv_depthwise_kernel_size=5),
    'electra':dict(embedding_size=24), 'esm':dict(position_embedding_type='rotary', mask_token_id=4),
    'modernbert':dict(local_attention=8, global_attn_every_n_layers=2),
    'deberta-v2':dict(relative_attention=True, pos_att_type=['p2c','c2p']),
    'mistral':dict(sliding_window=8), 'gemma':dict(head_dim=16), 'gemma2':sliding, 'gemma3_text':sliding,
    'distilbert':dict(dim=32, n_layers=2, n_heads=2, hidden_dim=48),
    'gpt2':dict(n_embd=32, n_layer=2, n_head=2, n_positions=44), 'gptj':dict(n_embd=32, n_layer=2, n_head=2, rotary_dim=8),
    'gpt_neo':dict(num_layers=2, num_heads=2, attention_types=[[['global','local'],1]], window_size=6),
    'opt':dict(ffn_dim=48, word_embed_proj_dim=32), 'qwen3':dict(head_dim=16), 'mixtral':dict(num_local_experts=4),
    'qwen3_moe':dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    'whisper':dict(halves, num_mel_bins=8, max_target_positions=24, max_source_positions=20, begin_suppress_tokens=None),
    'bart':dict(halves, max_position_embeddings=44, forced_eos_token_id=None),
    'moonshine':dict(named, hidden_size=32, intermediate_size=48, initializer_range=.2, encoder_num_hidden_layers=2,
                     decoder_num_hidden_layers=2, encoder_num_attention_heads=4, decoder_num_attention_heads=4)}
GROUPED = {'llama','mistral','qwen2','qwen3','olmo','olmo2','phi','phi3','smollm3','granite','gemma','gemma2','gemma3_text','stablelm',
           'starcoder2','cohere','mixtral','qwen3_moe'} # with one key for two queries
IN_FLOAT32 = {'gemma2','mixtral','qwen3_moe'} # parts of them do not compute in float64
ROUGH = IN_FLOAT32|{'gptj'} # whose attention is computed in float32
LEAKS = {'data2vec-audio','sew','wav2vec2-conformer'} # padding leaks through convolutions of the source
ARGS = dict(mamba2=dict(d_state=8, headdim=8), mamba=dict(d_state=4), linformer=dict(k=4, max_length=44))

def kind(f):
    "What a family reads: 'audio', 'pictures', 'both' (an encoder and a decoder) or 'text'"
    if any('Seq2Seq' in auto for auto in f.heads): return 'both'
    if any('Image' in auto for auto in f.heads): return 'pictures'
    return 'audio' if 'AutoModelForCTC' in f.heads else 'text'

def source(f, head):
    "A small model of family `f` with the class `head`, in float64 where it can be"
    size = dict(dict(audio=waves, pictures=pictures, text=tokens, both={})[kind(f)])
    if f.name in GROUPED: size['num_key_value_heads'] = 1
    size.update(SIZES.get(f.name, {}))
    config = getattr(transformers, f.config)(**{k: v for k,v in size.items() if v is not None})
    torch.manual_seed(0)
    if f.name not in IN_FLOAT32: torch.set_default_dtype(torch.float64)
    try: return head(config).eval()
    finally: torch.set_default_dtype(torch.float32)

def inputs(f)->dict:
    "Two samples, of 20 and of 14 positions where a family has a mask"
    g = torch.Generator().manual_seed(1)
    def noise(*shape): return torch.randn(*shape, generator=g, dtype=torch.float64)
    if f.name=='whisper': return dict(input_features=noise(2, 8, 40))
    if f.name=='moonshine': return dict(input_values=noise(2, 9000))
    if kind(f)=='pictures': return dict(pixel_values=noise(2, 3, 32, 32))
    n = 14
    if f.name=='wav2vec2-bert': batch = dict(input_features=noise(2, 20, 20))
    elif kind(f)=='audio': batch,n = dict(input_values=noise(2, 6400)),14*320
    else: batch = dict(input_ids=torch.randint(4, 60, (2,20), generator=g))
    longest = next(iter(batch.values())).shape[1]
    return {**batch, 'attention_mask': (torch.arange(longest)<torch.tensor([longest,n])[:,None]).long()}

def labelled(f, model, auto:str)->dict:
    "`inputs` as the head of `model` reads them, with labels"
    g = torch.Generator().manual_seed(2)
    def numbers(high, *shape, low=0): return torch.randint(low, high, shape, generator=g)
    batch,config = inputs(f),model.config
    if auto=='AutoModelForMultipleChoice':
        batch = {k: v[:,None].repeat(1, 2, 1) for k,v in batch.items()}
        batch['input_ids'][:,1] = 63-batch['input_ids'][:,1] # two choices that differ: equal ones have no gradient
    if kind(f)=='both' and auto!='AutoModelForSequenceClassification':
        return {**batch, ('decoder_input_ids' if auto=='AutoModel' else 'labels'): numbers(60, 2, 7, low=4)}
    if auto=='AutoModel': return batch
    if auto=='AutoModelForSequenceClassification' and f.name=='bart': batch['input_ids'][:,-1] = 2 # it reads the last </s>
    if auto=='AutoModelForQuestionAnswering': return dict(batch, start_positions=numbers(14, 2), end_positions=numbers(14, 2))
    if auto=='AutoModelForCTC': return dict(batch, labels=numbers(12, 2, 3, low=1))
    if auto in ('AutoModelForMaskedLM','AutoModelForCausalLM'): return dict(batch, labels=numbers(60, 2, 20))
    if auto=='AutoModelForTokenClassification': return dict(batch, labels=numbers(config.num_labels, 2, 20))
    if auto=='AutoModelForMultipleChoice': return dict(batch, labels=numbers(2, 2))
    classes = numbers(config.num_labels, 2)
    if auto!='AutoModelForAudioFrameClassification': return dict(batch, labels=classes)
    with torch.no_grad(): frames = model(**batch).logits.shape[1]
    return dict(batch, labels=F.one_hot(classes[:,None].repeat(1, frames), config.num_labels))

# ---- the checks

def cast(batch, model):
    "`batch` in the precision of `model`"
    return {k: v.to(model.dtype) if v.is_floating_point() else v for k,v in batch.items()}

def tensors(x)->list:
    "All tensors of a model's output, but for the state of a cache"
    if isinstance(x, torch.Tensor): return [x]
    if isinstance(x, dict): return [t for k,v in x.items() if 'past' not in k for t in tensors(v)]
    return [t for v in x for t in tensors(v)] if isinstance(x, (tuple,list)) else []

@torch.no_grad()
def outputs(model, batch)->list: return tensors(model(**batch, output_hidden_states=True))

def distance(a:list, b:list)->float:
    assert len(a)==len(b)>0
    return max(float((x.double()-y.double()).abs().max()) for x,y in zip(a, b))

def train(model, batch, steps:int=2)->list:
    "Losses of `steps` of AdamW"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    model.train()
    model.config.layerdrop = 0. # every layer learns
    for _ in range(steps):
        out = model(**batch)
        loss = out.loss if out.get('loss') is not None else out[0].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses

def padding_error(f, model)->float:
    "Largest difference between the states of the shorter sample in a batch and alone; None without a mask"
    batch = cast(inputs(f), model)
    if 'attention_mask' not in batch: return None
    base = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    n = int(batch['attention_mask'][1].sum())
    alone = {k: v[1:,:n] for k,v in batch.items() if k!='attention_mask'}
    with torch.no_grad(): both = [base(**x, output_hidden_states=True).hidden_states for x in (batch,alone)]
    return max(float((together[1,:own.shape[1]]-own[0]).abs().max()) for together,own in zip(*both))

def written(model, ids, mask, n:int=4, **kwargs):
    return model.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=1, eos_token_id=None, **kwargs)

@torch.no_grad()
def decoding(model, batch, most:float)->dict:
    "Does a decoder do the same with a cache and without, in a padded batch and alone, in pieces and at once, in a continued chat and anew?"
    model = copy.deepcopy(model)
    ids,mask = batch['input_ids'],batch['attention_mask'].flip(1) # pads in front
    n = int(mask[1].sum())
    found = {}
    for name,args in dict(greedy={}, beams=dict(num_beams=3)).items():
        found[name] = torch.equal(written(model, ids, mask, **args), written(model, ids, mask, use_cache=False, **args))
    together,alone = written(model, ids, mask),written(model, ids[1:,-n:], mask[1:,-n:])
    found['left padding'] = torch.equal(together[1,-4:], alone[0,-4:])
    cache,pieces = DynamicCache(config=model.config),[]
    for piece in ids[:1].split([7,1,12], 1): pieces.append(model(piece, past_key_values=cache, use_cache=True).logits)
    found['pieces'] = distance([torch.cat(pieces, 1)], [model(ids[:1], use_cache=False).logits])<most
    first = written(model, ids, mask, return_dict_in_generate=True)
    said = torch.cat([first.sequences, ids[:,:3]], 1) # the answer, and the next question
    seen = torch.cat([mask, mask.new_ones(2, 7)], 1)
    found['chat'] = torch.equal(written(model, said, seen, past_key_values=first.past_key_values), written(model, said, seen, use_cache=False))
    return found

LOADER = '''import json,sys,torch,transformers
from safetensors.torch import load_file
import cald
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
sys.path.insert(0, sys.argv[1])
from matrix import distance,outputs
for line in sys.stdin:
    folder,auto = json.loads(line)
    try:
        model = getattr(transformers, auto).from_pretrained(folder, dtype='auto').eval()
        batch,weights = load_file(f'{folder}/batch.st'),load_file(f'{folder}/model.safetensors')
        wanted = [batch.pop(k) for k in sorted(k for k in batch if k.startswith('out'))]
        have = model.state_dict()
        same = all(torch.equal(have[n], w) for n,w in weights.items() if n in have) # experts are stored in another form
        print(json.dumps(distance(outputs(model, batch), wanted) if same else 'other weights'), flush=True)
    except Exception as e: print(json.dumps(f'{type(e).__name__}: {e}'), flush=True)
'''

class Loader:
    "Another process that loads what this one has saved"
    def __init__(self):
        env = {**os.environ, 'PYTHONPATH':str(root), 'HF_HUB_OFFLINE':'1', 'OMP_NUM_THREADS':str(torch.get_num_threads())}
        command = [sys.executable,'-c',LOADER,str(root/'tests')]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)

    def error(self, model, batch, auto:str)->float:
        "Largest difference between the outputs of `model` and of what another process loads from its folder; a text for a failure"
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            wanted = {f'out{i:03}': t.contiguous().clone() for i,t in enumerate(outputs(model, batch))}
            save_file({**{k: v.contiguous() for k,v in batch.items()}, **wanted}, f'{folder}/batch.st')
            self.process.stdin.write(json.dumps([folder, auto])+'\n')
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)

def cases()->list: # of (family, class of the source, mixer)
    "Every family x head x mixer"
    found = []
    for f in FAMILIES.values():
        if f.name not in BUILT_IN: continue
        fitting = [to for to in MIXERS if to!='identity' and (to!='linformer' or f.projections)]
        found += itertools.product([f.name], [head.__name__ for head in f.students], fitting)
    return found

BUILT_IN = tuple(FAMILIES) # not those that tests register

def check(family:str, head:str, to:str, loader)->dict:
    "The properties of one case; each is True, '' where it does not apply, or says what is wrong"
    f = FAMILIES[family]
    cls = next(c for c in f.students if c.__name__==head)
    auto = f.students[cls].auto
    most = 1e-5 if family in ROUGH else 1e-9
    model = source(f, cls)
    batch = cast(labelled(f, model, auto), model)
    row = dict(family=family, head=head, mixer=to)
    row['identity'] = all(map(torch.equal, outputs(convert(model, to='identity'), batch), outputs(model, batch)))
    student = convert(model, to=to, seed=0, **ARGS.get(to, {}))
    before = {n: p.detach().clone() for n,p in student.named_parameters() if n in set(student.new_weights())}
    losses = train(student, batch)
    still = [n for n,p in student.named_parameters() if n in before and torch.equal(p, before[n])]
    row['trained'] = not still and all(map(torch.isfinite, torch.tensor(losses))) or f'losses {losses}, unchanged {still[:3]}'
    error = padding_error(f, student)
    row['padding'] = '' if error is None else 'leaks in the source' if family in LEAKS else error<most or error
    error = loader.error(student, batch, auto)
    row['saved'] = error if isinstance(error, str) else error<most or error
    if auto=='AutoModelForCausalLM':
        hybrid = convert(model, to=to, layers=[1], seed=0, **ARGS.get(to, {}))
        both = [decoding(m, batch, most) for m in (student,hybrid)]
        row |= {k: v and both[1][k] for k,v in both[0].items()}
    if 'Seq2Seq' in auto:
        ours = [student.generate(**inputs_of(batch), max_new_tokens=6, do_sample=False, use_cache=c) for c in (True,False)]
        row['greedy'] = torch.equal(*ours)
    return row

def inputs_of(batch): return {k: v for k,v in batch.items() if k!='labels'}

def problems(row)->list:
    "The properties that `row` lacks"
    fine = ('','leaks in the source')
    return [f'{k}: {v}' for k,v in row.items() if k not in ('family','head','mixer') and v is not True and v not in fine]

def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings('ignore', 'Support for mismatched key_padding_mask', UserWarning) # from WavLM

# ---- the table

def shown(rows)->pd.DataFrame:
    "A row for each family and head, a column for each mixer: what holds, or what does not"
    df = pd.DataFrame(rows).fillna('')
    df['state'] = ['; '.join(problems(r)) or 'all' for r in df.to_dict('records')]
    order = {c: pd.Categorical(df[c], df[c].unique()) for c in ('family','head','mixer')}
    return df.assign(**order).pivot(index=['family','head'], columns='mixer', values='state').astype(object).fillna('').sort_index()

def write(rows, out, code, seconds, families): # code: of `git_state` before the run; families: those that were run, or none for all
    "matrix.csv, matrix.md, and matrix.json about the run; a run of some families replaces their rows and is recorded after the whole one"
    file = out/'matrix.json'
    runs = json.loads(file.read_text())['runs'] if families else []
    if families:
        kept = pd.read_csv(out/'matrix.csv', keep_default_na=False).replace({'True':True}).to_dict('records')
        new = {(r['family'],r['head'],r['mixer']): r for r in [*kept, *rows]}
        rows = [new[c] for c in cases() if c in new]
    pd.DataFrame(rows).to_csv(out/'matrix.csv', index=False, lineterminator='\n')
    names = 'identity, trained two steps, padding, saved and loaded in another process'
    decoders = 'greedy and by beams with a cache and without, pads in front, in pieces, a chat continued'
    table = to_markdown(shown(rows).reset_index())
    note = f'*all*: {names}; decoders with a language model head also {decoders}, for a model with mixers in every layer and for a hybrid.'
    (out/'matrix.md').write_text(f'{table}\n{note}\n')
    runs.append(dict(families=families or 'all', **code, environment=environment(), device=device_name(), seconds=round(seconds, 1)))
    record = dict(cases=len(rows), failed=sum(bool(problems(r)) for r in rows), runs=runs)
    file.write_text(json.dumps(record, indent=1)+'\n')

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('families', nargs='*', help='whose rows to make again; default: all')
    wanted = parser.parse_args().families
    quiet()
    loader,code,began,rows = Loader(),git_state(),time.monotonic(),[]
    for case in cases():
        if wanted and case[0] not in wanted: continue
        try: rows.append(check(*case, loader))
        except Exception as e: rows.append(dict(zip(('family','head','mixer'), case), trained=f'{type(e).__name__}: {e}'))
        print(*case, '; '.join(problems(rows[-1])) or 'all', flush=True)
    loader.close()
    write(rows, root/'tests', code, time.monotonic()-began, wanted)
    sys.exit(any(map(problems, rows)))
