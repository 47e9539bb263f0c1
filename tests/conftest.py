"The table that closes `pytest -m faults`: what the tests marked `faults` have injected, and what came of it."
def pytest_collection_modifyitems(items):
    for item in items:
        marks = list(item.iter_markers('faults'))
        if marks: item.user_properties.append(('refused', any(m.kwargs.get('refused') for m in marks)))

def fault_counts(reports)->dict:
    "Counts over the `reports` of tests: of a test that records `kills`, those; of another one, one fault"
    counts = dict.fromkeys(('faults injected', 'survived', 'refused with a named error', 'steps of work lost'), 0)
    for report in reports:
        found = dict(report.user_properties)
        if report.when!='call' or 'refused' not in found: continue
        n = found.get('kills', 1)
        counts['faults injected'] += n
        if report.passed: counts['refused with a named error' if found['refused'] else 'survived'] += n
        counts['steps of work lost'] += found.get('steps lost', 0)
    return counts

def pytest_terminal_summary(terminalreporter, config):
    if config.option.markexpr!='faults': return
    stats = terminalreporter.stats
    terminalreporter.section('faults')
    for name,n in fault_counts(stats.get('passed', [])+stats.get('failed', [])).items():
        terminalreporter.write_line(f'{name:28} {n:4}')
