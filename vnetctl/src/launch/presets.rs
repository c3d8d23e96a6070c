//! The sets of rules that come with this program: policy files in `presets`, each with its own tests.
//!
//! `--preset NAME` puts what a file allows before a guest's own rules, as `--allow` does. A preset allows names
//! and their ports, and says nothing else: that is all that rules given in this way can say.

use vnet_controlplane::policy::{
    DefaultAction, DnsAnswer, NameGuards, Policy, ProtocolSet, RuleAction, Settings,
};
use vnet_proto::model::{NamePattern, PortRange, Target};

use crate::failure::Failure;

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preset {
    /// Its name.
    pub name: &'static str,
    /// Its file.
    pub document: &'static str,
}

/// All of them, by name.
pub const ALL: &[Preset] = &[
    preset("crates", include_str!("../../presets/crates.yaml")),
    preset("debian", include_str!("../../presets/debian.yaml")),
    preset("github", include_str!("../../presets/github.yaml")),
    preset("go", include_str!("../../presets/go.yaml")),
    preset("npm", include_str!("../../presets/npm.yaml")),
    preset("pypi", include_str!("../../presets/pypi.yaml")),
    preset("ubuntu", include_str!("../../presets/ubuntu.yaml")),
];

const fn preset(name: &'static str, document: &'static str) -> Preset {
    Preset { name, document }
}

impl Preset {
    /// What it is for: its file's first line.
    pub fn about(&self) -> &'static str {
        let first = self.document.lines().next().unwrap_or_default();
        first.trim_start_matches(['#', ' '])
    }

    /// What it allows, as rules of a command line.
    ///
    /// # Errors
    /// When its file does not load or says more than such rules can; a test sees to it that none does.
    pub fn rules(&self) -> Result<Vec<String>, Failure> {
        let broken = |what: &str| Failure::Failed(format!("preset {} {what}", self.name));
        let policy = Policy::parse(self.name, self.document).map_err(|errors| broken(&errors.to_string()))?;
        if !says_only_rules(&policy) {
            return Err(broken(
                "says more than its rules, which would be lost (expected version, defaultAction: deny, rules, dns with defaultAction: deny, tests)",
            ));
        }
        let mut rules = Vec::new();
        for rule in policy.rules.as_slice() {
            let names = rule
                .test
                .names
                .as_ref()
                .filter(|_| rule.action == RuleAction::Allow);
            let names = names.ok_or_else(|| broken("has a rule that does not allow names"))?;
            let only_names_and_ports = rule.test.prefixes.is_empty()
                && !rule.test.ports.is_empty()
                && rule.test.protocols == ProtocolSet::TCP_UDP
                && names.expressions().is_none()
                && rule.vms.is_none()
                && rule.demand.is_none()
                && rule.until.is_none();
            if !only_names_and_ports {
                return Err(broken(&format!(
                    "has a rule of other than names and ports, {} (line {})",
                    rule.label, rule.line
                )));
            }
            // In an order of their own: the set has none.
            let mut patterns: Vec<NamePattern> = names.patterns().collect();
            patterns.sort();
            for pattern in patterns {
                let each = rule.test.ports.ranges().iter();
                rules.extend(each.map(|ports| allow(&pattern, *ports)));
            }
        }
        Ok(rules)
    }
}

/// Whether a document is one of rules alone, but for what holds with any `--allow`.
fn says_only_rules(policy: &Policy) -> bool {
    let dns = policy.dns.as_ref();
    policy.mode.is_none()
        && policy.default_action != Some(DefaultAction::Allow)
        && dns.is_none_or(|dns| {
            dns.default_action != Some(DefaultAction::Allow)
                && dns.allowed.is_empty()
                && dns.blocked.is_empty()
                && dns.answer == DnsAnswer::default()
        })
        && policy.name_guards == NameGuards::default()
        && policy.approval_timeout.is_none()
        && policy.applies_to.is_none()
        && policy.settings == Settings::default()
        && policy.profiles.is_empty()
        && !policy.leaves_lookups_open()
}

fn allow(pattern: &NamePattern, ports: PortRange) -> String {
    let target = Target::Name {
        pattern: pattern.clone(),
        ports: Some(ports),
        lookup_only: false,
    };
    format!("allow {target}")
}

/// The preset of a name.
///
/// # Errors
/// With the nearest names, if none has it.
pub fn find(name: &str) -> Result<Preset, Failure> {
    if let Some(preset) = ALL.iter().find(|preset| preset.name == name) {
        return Ok(*preset);
    }
    let mut near: Vec<(usize, &str)> = ALL
        .iter()
        .map(|preset| (distance(name, preset.name), preset.name))
        .filter(|(distance, known)| *distance <= known.len().div_ceil(2))
        .collect();
    near.sort_unstable();
    let known: Vec<&str> = ALL.iter().map(|preset| preset.name).collect();
    let hint = match near.is_empty() {
        true => format!("expected one of: {}", known.join(", ")),
        false => {
            let near: Vec<&str> = near.into_iter().take(3).map(|(_, name)| name).collect();
            format!(
                "did you mean {}? list them with: vnetctl policy presets",
                near.join(" or ")
            )
        }
    };
    Err(Failure::Usage(format!("there is no preset {name:?} ({hint})")))
}

/// How many letters must be changed, added or left out to make one of the other (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    // What a person types by mistake is short.
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(64).collect(), b.chars().collect());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let changed = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use vnet_controlplane::clock::Clock;
    use vnet_controlplane::policy::{OwnPolicy, Policy};

    use super::*;

    #[test]
    fn each_preset_loads_without_a_warning_and_passes_its_own_tests() {
        for preset in ALL {
            let policy = Policy::parse(preset.name, preset.document).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(policy.warnings, [], "{}", preset.name);
            assert!(policy.probes() >= 3, "{} has hardly any tests", preset.name);
            assert!(!preset.document.contains("guards:"), "{}", preset.name);
            policy
                .run_tests(preset.name, Clock::system().now())
                .unwrap_or_else(|e| panic!("{e}"));
            assert!(
                preset.document.starts_with("# ") && preset.about().len() > 20,
                "{}",
                preset.name
            );
        }
        assert!(ALL.is_sorted_by_key(|preset| preset.name));
    }

    #[test]
    fn as_rules_of_a_command_line_a_preset_says_what_its_file_says() {
        for preset in ALL {
            let rules = preset.rules().unwrap();
            assert!(!rules.is_empty());
            OwnPolicy::parse("", None, &rules).unwrap_or_else(|e| panic!("{e}"));
            // The same tests, put to a document that holds these rules and no others.
            let mut document = String::from("version: 1\nrules:\n");
            for rule in &rules {
                let target = rule.strip_prefix("allow domain ").expect("a name");
                let (name, ports) = target.split_once(':').expect("ports");
                document += &format!("  - {{action: allow, domains: [\"{name}\"], ports: [\"{ports}\"]}}\n");
            }
            let (_, tests) = preset.document.split_once("\ntests:").expect("tests");
            let policy = Policy::parse(preset.name, &format!("{document}tests:{tests}")).unwrap();
            policy
                .run_tests(preset.name, Clock::system().now())
                .unwrap_or_else(|e| panic!("{e}"));
        }
    }

    #[test]
    fn what_rules_of_a_command_line_cannot_say_is_refused_and_not_lost() {
        let rules = |document: &'static str| {
            Preset {
                name: "odd",
                document,
            }
            .rules()
        };
        let good = "version: 1\nrules: [{action: allow, domains: [a.test], ports: [22, 443]}]\n";
        assert_eq!(
            rules(good).unwrap(),
            ["allow domain a.test:22", "allow domain a.test:443"]
        );
        for (document, expected) in [
            (
                "version: 1\nrules: [{action: allow, domains: [a.test], ports: [443], protocol: tcp}]\n",
                "preset odd has a rule of other than names and ports, rules[0] (line 2)",
            ),
            (
                "version: 1\nrules: [{action: allow, domains: [a.test], ports: [443], sni: match-if-present}]\n",
                "of other than names and ports",
            ),
            (
                "version: 1\nrules: [{action: allow, domains: [a.test], ports: [443], until: 2096-12-31T00:00:00Z}]\n",
                "of other than names and ports",
            ),
            (
                "version: 1\nrules: [{action: allow, domains: [a.test], ports: [443], vm: {name: a}}]\n",
                "of other than names and ports",
            ),
            (
                "version: 1\nrules: [{action: allow, domains: [a.test]}]\n",
                "of other than names and ports",
            ),
            (
                "version: 1\nrules: [{action: deny, domains: [a.test], ports: [443]}]\n",
                "does not allow names",
            ),
            ("version: 1\nmode: ask\n", "says more than its rules"),
            ("version: 1\ndefaultAction: allow\n", "says more than its rules"),
            (
                "version: 1\ndns: {allowedDomains: [a.test]}\n",
                "says more than its rules",
            ),
            (
                "version: 1\ndns: {answer: synthetic}\n",
                "says more than its rules",
            ),
            ("version: 1\ndns: {ttl: {max: 5s}}\n", "says more than its rules"),
            ("version: 1\nguards: {quic: deny}\n", "says more than its rules"),
            ("version: 1\nguards: {host: off}\n", "says more than its rules"),
            ("version: 1\napprovalTimeout: 5\n", "says more than its rules"),
            ("version: 1\nappliesTo: {name: a}\n", "says more than its rules"),
            ("defaultAction: deny\n", "says more than its rules"),
        ] {
            let said = rules(document).map_err(|error| error.to_string());
            assert!(
                said.as_ref().is_err_and(|error| error.contains(expected)),
                "{document}: {said:?}"
            );
        }
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_nearest() {
        assert_eq!(find("npm").unwrap().name, "npm");
        let error = |name: &str| find(name).unwrap_err().to_string();
        assert!(error("pipy").contains("did you mean pypi?"), "{}", error("pipy"));
        assert!(error("github.com").contains("github"), "{}", error("github.com"));
        assert!(
            error("kubernetes").contains("expected one of: crates, debian"),
            "{}",
            error("kubernetes")
        );
        assert!(error(&"x".repeat(100_000)).len() < 101_000);
    }

    #[test]
    fn distances_count_letters() {
        for (a, b, expected) in [
            ("", "npm", 3),
            ("npm", "npm", 0),
            ("npn", "npm", 1),
            ("pipy", "pypi", 2),
            ("deb", "debian", 3),
        ] {
            assert_eq!(distance(a, b), expected, "{a} {b}");
        }
    }
}
