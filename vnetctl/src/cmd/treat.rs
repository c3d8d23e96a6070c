//! How a guest is to be treated: the options that `run` and `up` share. What they say applies to that
//! dataplane's VMs alone, never to the policy `default`.

use std::path::PathBuf;

use clap::{ArgMatches, Args, FromArgMatches};
use vnet_proto::model::{Mode, Target};

use crate::failure::Failure;
use crate::launch::{self, Document};
use crate::output::words;

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
    /// Allow what a preset has, before the file's rules; `vnetctl policy presets` lists them; may be repeated
    #[arg(long, value_name = "NAME")]
    pub preset: Vec<String>,
    /// enforce, ask, observe, block or quarantine
    #[arg(long, value_name = "MODE")]
    pub mode: Option<Mode>,
    /// Let it reach 169.254.0.0/16, where clouds have their metadata: a last rule, behind all others
    #[arg(long)]
    pub ec2_metadata_access: bool,
}

/// What a guest brings along, checked.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Treatment {
    /// A policy document.
    pub document: Option<Document>,
    /// Rules before it, as `allow tcp 192.0.2.7:80`.
    pub rules: Vec<String>,
    /// A mode.
    pub mode: Option<Mode>,
    /// 169.254.0.0/16 is open to it.
    pub ec2_metadata_access: bool,
    /// What a person should know of the document, a line each.
    pub warnings: Vec<String>,
}

impl TreatArgs {
    /// Reads and checks everything that can be wrong, and adds what is to the problems.
    pub fn check(&self, problems: &mut Problems) -> Treatment {
        let mut told = |problem: Failure| problems.found.push(problem.to_string());
        let document = match self
            .network_policy
            .as_deref()
            .map(launch::read_document)
            .transpose()
        {
            Ok(document) => document,
            Err(problem) => {
                told(problem);
                None
            }
        };
        let mut rules = self.rules.0.clone();
        // After the rules that were typed, so that a --deny stands before them.
        for name in &self.preset {
            match launch::presets::find(name).and_then(|preset| preset.rules()) {
                Ok(found) => rules.extend(found),
                Err(problem) => problems.usage.push(problem.to_string()),
            }
        }
        if let Err(problem) = launch::check_own(None, &rules) {
            problems.usage.push(problem.to_string());
        }
        let typed = self.rules.0.iter().filter_map(|rule| rule.strip_prefix("allow "));
        let typed = typed.filter_map(|words| words.parse::<Target>().ok());
        let mut warnings: Vec<String> = typed.filter_map(|target| words::warning(&target)).collect();
        if let Some(document) = &document {
            match launch::check_own(Some(document), &[]) {
                Ok(found) => warnings.extend(launch::warning_lines(&document.source, &found)),
                Err(problem) => told(problem),
            }
        }
        let mode = if self.secure_mode {
            Some(Mode::Ask)
        } else {
            self.mode
        };
        Treatment {
            document,
            rules,
            mode,
            ec2_metadata_access: self.ec2_metadata_access,
            warnings,
        }
    }
}

/// `--allow RULE` and `--deny RULE` in the order they were typed, since the first that matches wins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuleArgs(pub Vec<String>);

impl Args for RuleArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        let rule = |name: &'static str, help: &'static str| {
            clap::Arg::new(name)
                .long(name)
                .value_name("RULE")
                .action(clap::ArgAction::Append)
                .help(help)
        };
        command
            .arg(rule(
                "allow",
                "Allow a destination, as 'tcp 192.0.2.7:80' or 'domain *.example.com'; may be repeated",
            ))
            .arg(rule(
                "deny",
                "Deny a destination; of --allow and --deny the first that matches wins",
            ))
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
            rules.extend(
                places
                    .zip(texts)
                    .map(|(place, text)| (place, format!("{action} {text}"))),
            );
        }
        rules.sort();
        Ok(Self(rules.into_iter().map(|(_, rule)| rule).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Everything that is wrong with what `run` or `up` was given.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Problems {
    /// With what was typed.
    pub usage: Vec<String>,
    /// With the files and sockets that it names.
    pub found: Vec<String>,
}

impl Problems {
    /// A failure that says every problem, one a line: of usage, if anything that was typed is wrong.
    ///
    /// # Errors
    /// If there is any.
    pub fn none(mut self) -> Result<(), Failure> {
        let is_usage = !self.usage.is_empty();
        self.usage.append(&mut self.found);
        match self.usage.join("\n  ") {
            text if text.is_empty() => Ok(()),
            text if is_usage => Err(Failure::Usage(text)),
            text => Err(Failure::Failed(text)),
        }
    }
}

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

    fn check(words: &[&str]) -> (Treatment, Problems) {
        let mut problems = Problems::default();
        let treatment = parse(words).unwrap().check(&mut problems);
        (treatment, problems)
    }

    #[test]
    fn rules_keep_the_order_they_were_typed_in() {
        let args = parse(&[
            "--deny",
            "tcp 10.0.0.1:22",
            "--allow",
            "any 10.0.0.0/8",
            "--deny",
            "any 0.0.0.0/0",
        ])
        .unwrap();

        assert_eq!(
            args.rules.0,
            [
                "deny tcp 10.0.0.1:22",
                "allow any 10.0.0.0/8",
                "deny any 0.0.0.0/0"
            ]
        );
    }

    #[test]
    fn a_name_that_anyone_may_own_is_warned_of_when_it_is_allowed() {
        let (treatment, problems) = check(&["--deny", "domain *.org", "--allow", "domain *.com:443"]);
        assert_eq!(problems, Problems::default());
        assert_eq!(
            treatment.warnings,
            ["warning: *.com covers a public suffix: anyone may own a name below com"]
        );
    }

    #[test]
    fn secure_mode_is_mode_ask_and_takes_no_other() {
        assert_eq!(check(&["--secure-mode"]).0.mode, Some(Mode::Ask));
        assert!(parse(&["--secure-mode", "--mode", "block"]).is_err());
        assert_eq!(check(&["--mode", "observe"]).0.mode, Some(Mode::Observe));
        assert!(check(&["--ec2-metadata-access"]).0.ec2_metadata_access);
        assert_eq!(check(&[]).0, Treatment::default());
    }

    #[test]
    fn a_preset_comes_after_the_rules_that_were_typed_and_before_the_file() {
        let (treatment, problems) = check(&[
            "--preset",
            "npm",
            "--deny",
            "domain registry.npmjs.org",
            "--preset",
            "pypi",
        ]);
        assert_eq!(problems, Problems::default());
        assert_eq!(
            treatment.rules,
            [
                "deny domain registry.npmjs.org",
                "allow domain registry.npmjs.org:443",
                "allow domain registry.yarnpkg.com:443",
                "allow domain files.pythonhosted.org:443",
                "allow domain pypi.org:443",
            ]
        );
        let (_, problems) = check(&["--preset", "nmp"]);
        assert!(problems.usage[0].contains("did you mean npm?"), "{problems:?}");
    }

    #[test]
    fn every_problem_is_said_at_once() {
        let (_, problems) = check(&[
            "--network-policy",
            "/nonexistent/policy.yaml",
            "--allow",
            "tcp",
            "--deny",
            "icmp 10.0.0.1:80",
        ]);

        let failure = problems.none().unwrap_err();

        let text = failure.to_string();
        for part in ["/nonexistent/policy.yaml", "--allow: ", "--deny: "] {
            assert!(text.contains(part), "{part} is missing in {text}");
        }
        assert_eq!(failure.exit_code(), 2, "what was typed is wrong too");
    }

    #[test]
    fn what_is_wrong_with_a_file_is_no_matter_of_usage() {
        let (_, problems) = check(&["--network-policy", "/nonexistent/policy.yaml"]);
        assert_eq!(problems.none().unwrap_err().exit_code(), 1);
        assert!(check(&["--allow", "tcp 192.0.2.7:80"]).1.none().is_ok());
    }
}
