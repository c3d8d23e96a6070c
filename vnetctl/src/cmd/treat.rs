//! How a guest is to be treated: the options that `run` and `up` share. What they say applies to that
//! dataplane's VMs alone.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{ArgMatches, Args, FromArgMatches};
use vnet_proto::model::Mode;

use super::select::label;
use crate::failure::Failure;
use crate::launch::{self, Document, ForwardSpec};

/// The options.
#[derive(Debug, Clone, Default, Args)]
pub struct TreatArgs {
    /// Ask before anything goes out that no rule decides (mode `ask`)
    #[arg(long, conflicts_with = "mode")]
    pub secure_mode: bool,
    /// A policy of its own, gone with it
    #[arg(long, value_name = "FILE")]
    pub network_policy: Option<PathBuf>,
    /// Rules.
    #[command(flatten)]
    pub rules: RuleArgs,
    /// enforce, ask, observe, block or quarantine
    #[arg(long, value_name = "MODE")]
    pub mode: Option<Mode>,
    /// A label; may be repeated
    #[arg(long = "label", value_name = "K=V", value_parser = label)]
    pub labels: Vec<(String, String)>,
    /// Open a port of the host that leads into the guest:
    /// [ADDRESS:]PORT:[GUEST:]PORT[/tcp|/udp]; may be repeated
    #[arg(short = 'p', long = "publish", value_name = "HOST:GUEST")]
    pub publish: Vec<ForwardSpec>,
    /// Where lookups are forwarded, rather than to the host's resolvers; may be repeated
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = resolver)]
    pub dns: Vec<SocketAddr>,
}

/// What a guest brings along, checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Treatment {
    /// A policy document.
    pub document: Option<Document>,
    /// Rules before it, as `allow tcp 192.0.2.7:80`.
    pub rules: Vec<String>,
    /// A mode.
    pub mode: Option<Mode>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// What a person should know of the document.
    pub warnings: Vec<String>,
}

impl TreatArgs {
    /// Reads and checks everything that can be wrong, and says all of it at once.
    ///
    /// # Errors
    /// Every problem, a line each.
    pub fn check(&self) -> Result<Treatment, Failure> {
        let mut problems = Vec::new();
        let document = match self.network_policy.as_deref().map(launch::read_document).transpose() {
            Ok(document) => document,
            Err(problem) => {
                problems.push(problem.to_string());
                None
            }
        };
        let mut labels = BTreeMap::new();
        for (key, value) in &self.labels {
            if let Some(other) = labels.insert(key.clone(), value.clone())
                && other != *value
            {
                problems.push(format!("--label {key} is given twice, as {other:?} and {value:?}"));
            }
        }
        let mut warnings = Vec::new();
        match launch::check_own(document.as_ref(), &self.rules.0) {
            Ok(found) => {
                let source = document.as_ref().map_or("", |d| &d.source);
                warnings = launch::warning_lines(source, &found);
            }
            Err(problem) => problems.push(problem.to_string()),
        }
        if !problems.is_empty() {
            return Err(Failure::Failed(problems.join("\n  ")));
        }
        let mode = if self.secure_mode { Some(Mode::Ask) } else { self.mode };
        Ok(Treatment { document, rules: self.rules.0.clone(), mode, labels, warnings })
    }
}

/// `--allow RULE` and `--deny RULE` in the order they were typed, since the first that matches wins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuleArgs(pub Vec<String>);

impl Args for RuleArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        let rule = |name: &'static str, help: &'static str| {
            clap::Arg::new(name).long(name).value_name("RULE").action(clap::ArgAction::Append).help(help)
        };
        command
            .arg(rule("allow", "Allow a destination, as 'tcp 192.0.2.7:80' or 'domain *.example.com'; may be repeated"))
            .arg(rule("deny", "Deny a destination; of --allow and --deny the first that matches wins"))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for RuleArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut rules: Vec<(usize, String)> = Vec::new();
        for action in ["allow", "deny"] {
            let texts = matches.get_many::<String>(action).unwrap_or_default();
            let places = matches.indices_of(action).into_iter().flatten();
            rules.extend(places.zip(texts).map(|(place, text)| (place, format!("{action} {text}"))));
        }
        rules.sort();
        Ok(Self(rules.into_iter().map(|(_, rule)| rule).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

fn resolver(text: &str) -> Result<SocketAddr, String> {
    let bare = text.parse::<IpAddr>().map(|address| SocketAddr::new(address, DNS_PORT));
    bare.or_else(|_| text.parse())
        .map_err(|_| format!("{text:?} is not a resolver's address (expected one as 192.0.2.53 or [2001:db8::53]:5353)"))
}

const DNS_PORT: u16 = 53;

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        treat: TreatArgs,
    }

    fn parse(words: &[&str]) -> Result<TreatArgs, clap::Error> {
        Line::try_parse_from(std::iter::once("x").chain(words.iter().copied())).map(|line| line.treat)
    }

    #[test]
    fn rules_keep_the_order_they_were_typed_in() {
        let args = parse(&["--deny", "tcp 10.0.0.1:22", "--allow", "any 10.0.0.0/8", "--deny", "any 0.0.0.0/0"]).unwrap();

        assert_eq!(args.rules.0, ["deny tcp 10.0.0.1:22", "allow any 10.0.0.0/8", "deny any 0.0.0.0/0"]);
    }

    #[test]
    fn secure_mode_is_mode_ask_and_takes_no_other() {
        let treatment = parse(&["--secure-mode"]).unwrap().check().unwrap();
        assert_eq!(treatment.mode, Some(Mode::Ask));
        assert!(parse(&["--secure-mode", "--mode", "block"]).is_err());
        assert_eq!(parse(&["--mode", "observe"]).unwrap().check().unwrap().mode, Some(Mode::Observe));
    }

    #[test]
    fn every_problem_is_said_at_once() {
        let args = parse(&[
            "--network-policy", "/nonexistent/policy.yaml", "--allow", "tcp", "--deny", "icmp 10.0.0.1:80",
            "--label", "a=1", "--label", "a=2",
        ])
        .unwrap();

        let problems = args.check().unwrap_err().to_string();

        for part in ["/nonexistent/policy.yaml", "--allow: ", "--deny: ", "--label a is given twice"] {
            assert!(problems.contains(part), "{part} is missing in {problems}");
        }
    }

    #[test]
    fn resolvers_have_port_53_unless_they_say() {
        assert_eq!(resolver("192.0.2.53"), Ok("192.0.2.53:53".parse().unwrap()));
        assert_eq!(resolver("[2001:db8::1]:5353"), Ok("[2001:db8::1]:5353".parse().unwrap()));
        assert!(resolver("dns.example").unwrap_err().contains("expected one as"));
    }
}
