//! `tests`: from the file's nodes to what is asked of the evaluator.

use vnet_proto::model::VmSelector;

use super::{RULES_MAX, is_unprintable, read_selector, read_text};
use crate::policy::Outcome;
use crate::policy::keys;
use crate::policy::reader::Reader;
use crate::policy::selftest::{self, Destination, PROBES_MAX, PolicyTest, Probe};
use crate::policy::yaml::Node;

/// Reads all tests. `claims` is the document's `appliesTo`.
pub(super) fn read_tests(reader: &mut Reader, node: &Node, claims: Option<&VmSelector>) -> Vec<PolicyTest> {
    let mut tests = Vec::new();
    let mut count = 0;
    for (index, node) in reader.list(node, "tests", RULES_MAX).iter().enumerate() {
        let Some(test) = read_test(reader, node, index, claims) else {
            continue;
        };
        count += test.probes.len();
        if count > PROBES_MAX {
            reader.problem(
                node,
                format!("tests has more than {PROBES_MAX} destinations in all; leave some out"),
            );
            break;
        }
        tests.push(test);
    }
    tests
}

fn read_test(
    reader: &mut Reader,
    node: &Node,
    index: usize,
    claims: Option<&VmSelector>,
) -> Option<PolicyTest> {
    let what = format!("tests[{index}]");
    let mut fields = reader.fields(node, &what, &keys::TEST);
    if !fields.are_a_mapping() {
        return None;
    }
    let label = fields
        .take("name")
        .and_then(|node| read_text(reader, node, "name"));
    let said = fields
        .take("vm")
        .map(|node| (node, read_selector(reader, node, "vm")));
    if let Some((node, Some(selector))) = &said
        && selector.name().is_some_and(|name| name.contains('*'))
    {
        let text = format!("{what}.vm.name is a pattern (expected one VM's name)");
        reader.problem(node, text);
    }
    let vm = selftest::vm_of(said.as_ref().map_or(claims, |(_, selector)| selector.as_ref()));
    if let (Some((node, Some(_))), Some(claims)) = (&said, claims)
        && !claims.matches(&vm.name, &vm.labels)
    {
        let text = format!(
            "{what}.vm is one that appliesTo ({claims}) does not claim; it is never under this policy"
        );
        reader.problem(node, text);
    }
    let mut probes = Vec::new();
    for (key, expected) in [
        ("allow", Outcome::Allow),
        ("deny", Outcome::Deny),
        ("ask", Outcome::Ask),
    ] {
        let Some(node) = fields.take(key) else { continue };
        for node in reader.list_of_some(node, key, PROBES_MAX) {
            probes.extend(read_probe(reader, node, key, expected));
        }
    }
    if probes.is_empty() && !reader.has_problems() {
        reader.problem(
            node,
            format!("{what} tests nothing (expected allow, deny or ask)"),
        );
    }
    Some(PolicyTest {
        label: label.unwrap_or(what),
        vm,
        probes,
    })
}

fn read_probe(reader: &mut Reader, node: &Node, key: &str, expected: Outcome) -> Option<Probe> {
    let text = reader.text(node, key)?;
    if text.chars().any(is_unprintable) {
        reader.problem(node, format!("{key}: {} cannot be shown", node.value));
        return None;
    }
    match text.parse::<Destination>() {
        Ok(destination) => Some(Probe {
            text: text.to_owned(),
            destination,
            expected,
            line: node.place.line,
            column: node.place.column,
        }),
        Err(problem) => {
            reader.problem(node, format!("{key}: {problem}"));
            None
        }
    }
}
