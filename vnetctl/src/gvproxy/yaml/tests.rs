//! The schema's edges: kinds, unknown keys, places, and policies cut out of the middle.

use super::*;
use crate::launch::yaml::ALIASED_MAX;

fn parse(text: &str) -> (FileConfig, Vec<String>) {
    let (config, warnings) = FileConfig::parse("c.yaml", text, false).unwrap();
    (config, warnings.iter().map(ToString::to_string).collect())
}

fn problems(text: &str) -> Vec<String> {
    let problems = FileConfig::parse("c.yaml", text, false).unwrap_err();
    problems.iter().map(ToString::to_string).collect()
}

fn text_of(given: Option<Given<String>>) -> String {
    given.unwrap().value
}

#[test]
fn a_file_of_nothing_says_nothing() {
    for text in [
        "",
        "# only this\n",
        "---\n",
        "{}",
        "stack:\n",
        "stack: ~\nlisten: []\npid-file: \"\"\n",
    ] {
        assert_eq!(parse(text), (FileConfig::default(), vec![]), "{text:?}");
    }
}

#[test]
fn a_scalar_is_text_where_text_belongs_however_it_is_written() {
    let (config, _) = parse(
        "pid-file: 0017\nlog-file: 1e3\nservices: True\nnotification: '12'\nstack: {gatewayMacAddress: 10:11:11:11:11:00, \
         subnet: 1.50}\n",
    );

    assert_eq!(text_of(config.pid_file), "0017");
    assert_eq!(text_of(config.log_file), "1e3");
    assert_eq!(text_of(config.services), "True");
    assert_eq!(text_of(config.notification), "12");
    assert_eq!(text_of(config.stack.gateway_mac), "10:11:11:11:11:00");
    assert_eq!(text_of(config.stack.subnet), "1.50");
}

#[test]
fn booleans_and_numbers_are_taken_as_gvproxy_takes_them() {
    for yes in ["true", "True", "TRUE", "yes", "on", "y", "Y", "\"yes\""] {
        assert!(
            parse(&format!("ec2-metadata-access: {yes}\n"))
                .0
                .ec2_metadata_access,
            "{yes}"
        );
    }
    for no in ["false", "False", "FALSE", "no", "off", "n", "N", "", "null"] {
        assert!(
            !parse(&format!("ec2-metadata-access: {no}\n"))
                .0
                .ec2_metadata_access,
            "{no}"
        );
    }
    for (written, number) in [
        ("1500", 1500),
        ("0x5dc", 1500),
        ("1_500", 1500),
        ("1500.0", 1500),
        ("-1", -1),
    ] {
        let (config, _) = parse(&format!("stack:\n  mtu: {written}\n"));
        assert_eq!(config.stack.mtu.unwrap().value, number, "{written}");
    }
}

#[test]
fn every_value_of_a_wrong_kind_is_told_with_place_key_found_and_expected() {
    let found = problems(
        "listen: unix:///a\nlog-level: [x]\nstack:\n  debug: \"true\"\n  mtu: \"1500\"\n  dns:\n    - records:\n        - ip: \
         {}\n    - 7\n  forwards: [a]\n  nat:\n    1.2.3.4:\n  gatewayVirtualIPs: [[], ~]\nforwards: {}\ninterfaces: 3\n",
    );

    assert_eq!(
        found,
        [
            "c.yaml:1:9: listen is \"unix:///a\" (expected a list)",
            "c.yaml:2:12: log-level is a list (expected text)",
            "c.yaml:4:10: stack.debug is \"true\" (expected true or false without quotes)",
            "c.yaml:5:8: stack.mtu is \"1500\" (expected a whole number without quotes)",
            "c.yaml:8:15: stack.dns[0].records[0].ip is a mapping (expected text)",
            "c.yaml:9:7: stack.dns[1] is \"7\" (expected a mapping)",
            "c.yaml:10:13: stack.forwards is a list (expected a mapping, as {127.0.0.1:2222: 192.168.127.2:22})",
            "c.yaml:12:5: stack.nat[\"1.2.3.4\"] is empty (expected one as {192.168.127.254: 127.0.0.1})",
            "c.yaml:13:23: stack.gatewayVirtualIPs[0] is a list (expected text)",
            "c.yaml:13:27: stack.gatewayVirtualIPs[1] is empty (expected text)",
            "c.yaml:14:11: forwards is a mapping (expected a list)",
            "c.yaml:15:13: interfaces is \"3\" (expected a mapping)",
        ]
    );
    assert_eq!(
        problems("stack: {mtu: 1.5}"),
        ["c.yaml:1:14: stack.mtu is \"1.5\" (expected a whole number, as 1500)"]
    );
    assert_eq!(
        problems("- a\n"),
        ["c.yaml:1:1: the file is a list (expected a mapping)"]
    );
}

#[test]
fn an_unknown_key_is_told_with_the_nearest_and_refused_only_when_strict() {
    let text =
        "lisen: []\nstack:\n  gatewayip: 1\n  dnsSearchDomain: []\ninterfaces: {kvm: x}\n3: x\n[a]: b\n";
    let strictly: Vec<String> = FileConfig::parse("c.yaml", &text.replace("[a]: b\n", ""), true)
        .unwrap_err()
        .iter()
        .map(ToString::to_string)
        .collect();

    let (config, warnings) = parse(&text.replace("[a]: b\n", ""));

    assert_eq!(config, FileConfig::default());
    assert_eq!(
        warnings,
        [
            "c.yaml:1:1: key \"lisen\" is not known in the file and is passed over (did you mean listen?)",
            "c.yaml:3:3: key \"gatewayip\" is not known in stack and is passed over (did you mean gatewayIP?)",
            "c.yaml:4:3: key \"dnsSearchDomain\" is not known in stack and is passed over (did you mean \
             dnsSearchDomains?)",
            "c.yaml:5:14: key \"kvm\" is not known in interfaces and is passed over (expected vpnkit, qemu, bess, stdio \
             or vfkit)",
            "c.yaml:6:1: key \"3\" is not known in the file and is passed over (expected listen, log-level, stack, \
             interfaces, forwards, pid-file, log-file, services, ec2-metadata-access or notification)",
        ]
    );
    let passed = warnings
        .iter()
        .map(|warning| warning.replace(" and is passed over", ""));
    assert_eq!(strictly, passed.collect::<Vec<_>>());
    assert!(problems(text)[0].starts_with("c.yaml:7:1: a key in the file is a list (expected listen, "));
}

#[test]
fn a_key_that_stands_twice_is_an_error_and_a_merged_one_is_not() {
    assert_eq!(
        problems("stack:\n  mtu: 1400\n  mtu: 1500\n  nat: {1.2.3.4: a, 1.2.3.4: b}\n"),
        [
            "c.yaml:3:3: key stack.mtu is given twice, first in line 2",
            "c.yaml:4:21: stack.nat[\"1.2.3.4\"] is given twice",
        ]
    );

    let (config, warnings) = parse("stack:\n  <<: {mtu: 1400, subnet: 10.0.0.0/8}\n  mtu: 9000\n");

    assert_eq!(config.stack.mtu.unwrap().value, 9000);
    assert_eq!(text_of(config.stack.subnet), "10.0.0.0/8");
    assert_eq!(warnings, [""; 0]);
}

#[test]
fn what_is_no_yaml_is_told_with_its_place() {
    assert!(
        problems("a: [\n")[0].starts_with("c.yaml:1:4: not valid YAML: "),
        "{:?}",
        problems("a: [\n")
    );
    assert_eq!(
        problems("listen: []\n---\nlisten: []\n"),
        [
            "c.yaml:2:1: not valid YAML: there is more than one document (expected one; remove the line --- here and what follows it)"
        ]
    );
    assert!(problems("stack: !include x\n")[0].starts_with("c.yaml:1:"));
    let deep = format!("{}{}", "[".repeat(1000), "]".repeat(1000));
    assert!(
        problems(&deep)[0].contains("it nests too deep"),
        "{:?}",
        problems(&deep)
    );
    assert_eq!(
        problems(&" ".repeat(FILE_BYTES_MAX + 1)),
        [format!(
            "c.yaml:1:1: the file is {} bytes long (at most {FILE_BYTES_MAX})",
            FILE_BYTES_MAX + 1
        )]
    );
}

#[test]
fn aliases_cannot_make_a_small_file_large() {
    let mut text = "a: &a0 [x]\n".to_owned();
    for n in 1..20 {
        let before = format!("*a{}, ", n - 1).repeat(10);
        text += &format!("k{n}: &a{n} [{before}]\n");
    }

    assert!(
        problems(&text)[0].contains("too many values or aliases"),
        "{:?}",
        problems(&text)
    );
}

/// The values of a tree.
fn nodes(node: &Node) -> usize {
    1 + match &node.value {
        Value::Null | Value::Scalar(_) => 0,
        Value::List(list) => list.iter().map(nodes).sum(),
        Value::Map(map) => map.iter().map(|(key, value)| nodes(key) + nodes(value)).sum(),
    }
}

#[test]
fn aliases_stand_for_so_many_values_and_for_not_one_more() {
    const WORDS: usize = 398;
    // With its beginning and its end such a list is of 400.
    let list = format!("[{}]", vec!["x"; WORDS].join(", "));
    let aliased = |times: usize| format!("a: &a {list}\nb: [{}]\n", vec!["*a"; times].join(", "));
    let times = ALIASED_MAX / (WORDS + 2);

    let most = load_tree(&aliased(times)).unwrap();
    let refused = load_tree(&aliased(times + 1)).unwrap_err();

    let of_a_list = 1 + WORDS;
    assert_eq!(nodes(&most), 4 + of_a_list + times * of_a_list);
    assert_eq!(
        refused.text,
        "not valid YAML: too many values or aliases: its aliases stand for more than 20000 values (write them out)"
    );
    // Also where they are merged in.
    let merged = |times: usize| {
        let keys: Vec<_> = (0..WORDS).map(|n| format!("k{n}: x")).collect();
        let uses = vec!["*a"; times].join(", ");
        format!("a: &a {{{}}}\nb: {{<<: [{uses}]}}\n", keys.join(", "))
    };
    assert!(load_tree(&merged(10)).is_ok());
    assert!(
        load_tree(&merged(times))
            .unwrap_err()
            .text
            .contains("its aliases stand for")
    );
    // What is written out is bounded by the file alone.
    let written = format!("b: [{}]\n", vec![list.as_str(); 2 * times].join(", "));
    assert_eq!(nodes(&load_tree(&written).unwrap()), 3 + 2 * times * of_a_list);
}

#[test]
fn findings_are_bounded() {
    let text: String = (0..1000).map(|n| format!("unknown-{n}: 1\n")).collect();

    let (_, warnings) = parse(&text);

    assert_eq!(warnings.len(), reader::FINDINGS_MAX + 1);
    assert_eq!(warnings.last().unwrap(), "c.yaml:100:1: 900 more are not shown");
}

/// What is in the place of the policy, with `defaultAction: deny` and something after it.
const POLICIES: [&str; 5] = [
    "stack:\n    networkPolicy:\n        defaultAction: deny # all\n        rules:\n        - action: allow\n          cidr: \
     \"10.0.0.0/8\"\n  # outside\n    mtu: 1400\nlisten: []\n",
    "stack: {networkPolicy: {defaultAction: deny,\n  # a } in a comment\n rules: [{action: allow, comment: \"} \\\" ]\"}]}, \
     mtu: 1400}\n",
    "stack:\n  networkPolicy:\n    defaultAction: deny\n\n    rules:\n      - {action: deny, comment: it's 'so', name: \
     'it''s }'}\n",
    "stack:\r\n  networkPolicy:\r\n    defaultAction: deny\r\n  mtu: 1400\r\n",
    "\u{feff}é: &p {defaultAction: deny}\nstack:\n  networkPolicy: *p\n",
];

#[test]
fn a_policy_keeps_its_places_when_it_is_cut_out() {
    for text in POLICIES {
        let (config, _) = parse(text);
        let policy = text_of(config.stack.network_policy);

        let place = |text: &str| {
            let before = &text[..text.find("defaultAction").unwrap()];
            let line = before.rsplit('\n').next().unwrap().trim_start_matches('\u{feff}');
            (before.matches('\n').count(), line.chars().count())
        };
        assert_eq!(place(&policy), place(text), "{policy}");
        assert!(!policy.contains("mtu") && !policy.contains("stack"), "{policy}");
        let said = tree::load(&policy).unwrap();
        assert!(matches!(&said.value, Value::Map(entries) if !entries.is_empty()));
        let rules = text.matches("action: ").count();
        assert_eq!(policy.matches("action: ").count(), rules, "{policy}");
    }
}

#[test]
fn a_policy_that_says_nothing_or_cannot_stand_alone_is_refused() {
    for (text, expected) in [
        (
            "networkPolicy:",
            "1:22: stack.networkPolicy is empty (expected at least defaultAction: deny",
        ),
        (
            "networkPolicy: {}",
            "1:24: stack.networkPolicy is empty (expected",
        ),
        (
            "networkPolicy: p.yaml",
            "1:24: stack.networkPolicy is \"p.yaml\" (expected a mapping, as in a policy file",
        ),
        (
            "networkPolicy: [a]",
            "1:24: stack.networkPolicy is a list (expected a mapping",
        ),
        (
            "subnet: &s x, networkPolicy: {name: *s}",
            "1:38: stack.networkPolicy cannot be read apart",
        ),
        (
            "outboundAllow: []",
            "1:24: stack.outboundAllow is empty, which would restrict nothing; leave it out",
        ),
        ("outboundAllow:", "stack.outboundAllow is empty, which"),
        (
            "outboundAllow: [\"\"]",
            "1:25: stack.outboundAllow[0] is empty, which would match every name",
        ),
        (
            "outboundAllow: [^a$, '']",
            "1:30: stack.outboundAllow[1] is empty, which would match every name",
        ),
        (
            "blockAllOutbound:",
            "stack.blockAllOutbound is empty (expected true or false)",
        ),
        (
            "outboundAllow: x",
            "1:24: stack.outboundAllow is \"x\" (expected a list)",
        ),
    ] {
        let found = problems(&format!("stack: {{{text}}}\n"));
        assert_eq!(found.len(), 1, "{found:?}");
        let stripped = found[0].strip_prefix("c.yaml:").unwrap();
        assert!(stripped.contains(expected), "{stripped}");
    }
}

#[test]
fn outbound_allow_becomes_a_policy_with_the_lines_of_the_file() {
    let (config, _) = parse("stack:\n  outboundAllow:\n    - ^a\\.test$\n    # b\n    - \"^\\\"b\\\"$\"\n");

    assert_eq!(
        text_of(config.stack.outbound_allow),
        "{version: 1, outboundAllow: [\n\n      \"^a\\\\.test$\",\n\n      \"^\\\"b\\\"$\"]}\n"
    );
}
