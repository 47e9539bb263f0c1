"Every family converts, trains, saves and decodes: one head and mixer of each, all with CALD_SLOW=1; the table of a whole run is beside this file"
import json, os
from pathlib import Path

import pandas as pd, pytest

import matrix
from matrix import cases,check,Loader,problems

matrix.quiet()
every = cases()

def a_part()->list:
    "One case of each family, the heads and mixers in turn; of a decoder its language model"
    found = []
    for i,family in enumerate(dict.fromkeys(f for f,_,_ in every)):
        own = [c for c in every if c[0]==family]
        decodes = [c for c in own if c[1].endswith(('ForCausalLM','LMHeadModel','ForConditionalGeneration'))]
        found.append((decodes or own)[(5*i)%len(decodes or own)])
    return found

@pytest.fixture(scope='module')
def loader():
    process = Loader()
    yield process
    process.close()

@pytest.mark.xdist_group('matrix')
@pytest.mark.parametrize('family,head,to', every if os.environ.get('CALD_SLOW') else a_part())
def test_a_family_with_a_head_and_a_mixer(family, head, to, loader): assert not problems(check(family, head, to, loader))

def test_the_part_has_every_mixer(): assert {to for _,_,to in a_part()}=={to for _,_,to in every}

def test_the_table_is_that_of_a_whole_run_without_failures():
    folder = Path(__file__).parent
    rows = pd.read_csv(folder/'matrix.csv', dtype=str, keep_default_na=False)
    assert set(rows[['family','head','mixer']].itertuples(index=False, name=None))=={c for c in every if c[2] in set(rows.mixer)}
    wrong = ~rows.drop(columns=['family','head','mixer']).isin(['True','','leaks in the source'])
    assert not wrong.any(axis=None)
    record = json.loads((folder/'matrix.json').read_text())
    assert (record['cases'],record['failed'])==(len(rows),0) and all(run['commit'] for run in record['runs'])
    assert (folder/'matrix.md').read_text().count('\n| ')==rows.groupby(['family','head']).ngroups+1

def test_what_is_wrong_is_said():
    row = dict(family='bert', head='BertModel', mixer='mamba2', identity=True, padding='leaks in the source', greedy='', saved=.5, pieces=False)
    assert problems(row)==['saved: 0.5','pieces: False']
