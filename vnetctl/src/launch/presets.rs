//! The sets of rules that come with this program: policy files in `presets`, each with its own tests.
//!
//! `--preset NAME` puts what a file allows before a guest's own rules, as `--allow` does. A preset allows names
//! and their ports, and says nothing else: that is all that rules given in this way can say.

use vnet_controlplane::policy::{Policy, RuleAction};
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
        let mut rules = Vec::new();
        for rule in policy.rules.as_slice() {
            let names = rule
                .test
                .names
                .as_ref()
                .filter(|_| rule.action == RuleAction::Allow);
            let names = names.ok_or_else(|| broken("has a rule that does not allow names"))?;
            if !rule.test.prefixes.is_empty() || rule.test.ports.is_empty() || rule.vms.is_some() {
                return Err(broken("has a rule of other than names and ports"));
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
