"""The tests of transformers for its own models, run on converted classes: python tests/hf_tests.py CHECKOUT [arguments of pytest]

CHECKOUT is the source tree of the installed version of transformers; its tests need the package parameterized. The sdist of PyPI has most
tests of models, but neither those of exporters nor those of generation, which are then left out."""
import importlib, os, sys, types, unittest
from pathlib import Path

import pytest, torch

checkout = os.environ.get('TRANSFORMERS_CHECKOUT', '')

def run(folder, *args):
    "Run this file by pytest; its exit code"
    os.environ['TRANSFORMERS_CHECKOUT'] = str(Path(folder).absolute())
    return pytest.main([__file__, '-q', '-p', 'no:cacheprovider', *args])

if __name__=='__main__':
    if not (sys.argv[1:] and (Path(sys.argv[1])/'tests/test_modeling_common.py').exists()): sys.exit(__doc__)
    sys.exit(run(*sys.argv[1:]))
if not checkout: pytest.skip('no source tree of transformers', allow_module_level=True)

sys.path.insert(0, checkout)
for name,mixin in {'tests.exporters.test_export':'ExportTesterMixin', 'tests.generation.test_utils':'GenerationTesterMixin'}.items():
    try: importlib.import_module(name)
    except ModuleNotFoundError:
        print(f'{checkout} has no {name}: its tests are left out')
        sys.modules[name] = types.SimpleNamespace(**{mixin:type(mixin, (), {})})
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin

import cald
from cald.models import FAMILIES

SIZES = dict(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=37,
             max_position_embeddings=64, pad_token_id=0)
ARGS = dict(mamba2=dict(d_state=8, headdim=8), mamba=dict(d_state=4), linformer=dict(k=8, share='none', max_length=64))

class Inputs:
    "What the tests call a model tester: a small configuration and a batch for it"
    batch_size,seq_length,num_hidden_layers,num_attention_heads,hidden_size,num_choices,is_training = 4,7,2,2,64,3,True
    def __init__(self, family, to, layers):
        self.spec = dict(family=family, to=to, layers=layers, args=ARGS[to])
        self.family = FAMILIES[family]
    def get_config(self):
        cls = next(iter(self.family.students.values())).config_class
        return cls(**SIZES, cald=self.spec)
    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(1, 99, (self.batch_size,self.seq_length))
        return self.get_config(),dict(input_ids=ids, attention_mask=torch.ones_like(ids))

STATE = 'a mixer keeps a state of constant size, which has no keys and values to look at'
GENERATION = { # start of the name of a test: why it cannot pass
    **dict.fromkeys(['test_assisted_decoding'], 'a state cannot return to an earlier token'),
    **dict.fromkeys(['test_beam_search_generate_dict_outputs_use_cache','test_greedy_generate_dict_outputs_use_cache',
                     'test_generate_with_static_cache','test_generate_from_inputs_embeds_with_static_cache',
                     'test_generate_compilation_all_outputs','test_past_key_values_format'], STATE),
    'test_inherits_generation_mixin':'it is inherited from the class of the source'}
REFUSED = {'test_model_weights_reload_no_missing_tied_weights':'a missing weight of a layer is an error'}
NO_ATTENTION = dict.fromkeys(['test_capture_outputs_decorator','test_model_rope_scaling_from_config','test_tp_plan_matches_params'],
                             'no layer has attention')

def cases(family, to, heads, layers=(0,1)):
    "The test class of one kind of converted models"
    source = {cls.__name__: cls for cls in FAMILIES[family].students}
    mixins = (GenerationTesterMixin,) if FAMILIES[family].causal else ()
    class Case(ModelTesterMixin, *mixins, unittest.TestCase):
        all_model_classes = tuple(FAMILIES[family].students[source[h]] for h in heads)
        has_attentions = False
        def setUp(self):
            reasons = REFUSED if len(layers)<Inputs.num_hidden_layers else {**REFUSED, **NO_ATTENTION}
            if mixins: reasons = {**reasons, **GENERATION}
            for start,why in reasons.items():
                if self._testMethodName.startswith(start): self.skipTest(why)
            self.model_tester = Inputs(family, to, list(layers))
    return type(f'Test_{family}_{to}', (Case,), {})

TestDecoderMamba2 = cases('gpt_neox', 'mamba2', ['GPTNeoXModel','GPTNeoXForCausalLM'])
TestHybridMamba = cases('gpt_neox', 'mamba', ['GPTNeoXModel','GPTNeoXForCausalLM'], layers=(1,))
TestEncoderMamba2 = cases('roberta', 'mamba2', ['RobertaModel','RobertaForMaskedLM','RobertaForSequenceClassification'])
TestEncoderLinformer = cases('roberta', 'linformer', ['RobertaModel','RobertaForMaskedLM'])
