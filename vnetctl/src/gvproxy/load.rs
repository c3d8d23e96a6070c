//! From a command line to what is to be run: reads the files that it names, and nothing else of the host.

use std::fmt::Display;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use vnet_proto::model::{ForwardListen, Name, Protocol};

use super::Config;
use super::config::{Host, PolicySource, Problem, Warning};
use super::flags::Flags;
use super::yaml::{FILE_BYTES_MAX, FileConfig};
use crate::failure::{Failure, how_to_read};
use crate::launch::{self, Document};
use crate::output::text::safe;

/// What is to be run.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// The guests' policy, checked, with its lists.
    pub policy: Option<Document>,
    /// What a person should know, a line each, safe to show.
    pub warnings: Vec<String>,
}

/// Reads the file of `-config` and the policy, and checks everything. `search_domains` are those of the host's
/// resolver.
///
/// # Errors
/// Everything that is wrong, a line each: with the file, or else with flags and file together, or else with the policy.
pub fn load(flags: &Flags, search_domains: &[Name]) -> Result<Loaded, Failure> {
    let (file, findings) = match &flags.config {
        Some(path) => {
            let shown = path.display().to_string();
            let text = read_bounded(path).map_err(|error| {
                failed([format!(
                    "-config {shown} cannot be read: {error}{}",
                    how_to_read(&error)
                )])
            })?;
            FileConfig::parse(&shown, &text, flags.strict).map_err(failed)?
        }
        None => Default::default(),
    };
    let host = Host {
        search_domains,
        exists: &is_taken,
        is_no_directory: &is_no_directory,
    };
    let (config, warnings) = Config::resolve(flags, file, &host).map_err(|mut problems| {
        for problem in &mut problems.0 {
            if let Problem::Exists { path, by, .. } = problem {
                let at = ForwardListen::Unix(path.clone());
                *by = launch::holder_of_port(Protocol::Tcp, &at).map(|holder| holder.to_string());
            }
        }
        failed(problems.to_string().lines())
    })?;
    let findings = findings.into_iter().map(Warning::File).chain(warnings);
    let warnings: Vec<String> = findings
        .map(|warning| line(&format!("warning: {warning}")))
        .collect();
    let mut loaded = Loaded {
        config,
        policy: None,
        warnings,
    };
    if let Some(source) = loaded.config.policy.clone() {
        let policy = read_policy(&source).map_err(|failure| match &source {
            PolicySource::File(_) => Failure::Failed(format!("-network-policy: {failure}")),
            PolicySource::Inline { .. } => failure,
        })?;
        loaded.check_policy(policy)?;
    }
    Ok(loaded)
}

impl Loaded {
    /// Reads and checks a policy, which becomes the guests'.
    ///
    /// # Errors
    /// Everything that is wrong with it, a line each.
    pub fn take_policy(&mut self, source: &PolicySource) -> Result<(), Failure> {
        self.check_policy(read_policy(source)?)
    }

    fn check_policy(&mut self, policy: Document) -> Result<(), Failure> {
        let found = launch::check_own(Some(&policy), &[])?;
        self.warnings
            .extend(launch::warning_lines(&policy.source, &found));
        self.policy = Some(policy);
        Ok(())
    }
}

fn is_no_directory(path: &Path) -> bool {
    // One that cannot be looked at is told when something is made in it.
    path.metadata()
        .is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

fn read_policy(source: &PolicySource) -> Result<Document, Failure> {
    match source {
        PolicySource::File(path) => launch::read_document(path),
        PolicySource::Inline { file, text } => {
            let beside = Path::new(&**file).parent().unwrap_or(Path::new(""));
            launch::document(file.to_string(), text.clone(), beside)
        }
    }
}

fn read_bounded(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    // One byte more is enough for the reader to refuse it.
    File::open(path)?
        .take(FILE_BYTES_MAX as u64 + 1)
        .read_to_string(&mut text)?;
    Ok(text)
}

fn failed(lines: impl IntoIterator<Item = impl Display>) -> Failure {
    let lines = lines.into_iter().map(|text| line(&text.to_string()));
    Failure::Failed(lines.collect::<Vec<_>>().join("\n  "))
}

fn line(text: &str) -> String {
    safe(text).into_owned()
}

/// Whether a path is taken for a socket: by whatever is there, but for a socket that the dataplane will replace.
fn is_taken(path: &Path) -> io::Result<bool> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        found => found.map(|_| !launch::is_stale_socket(path)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// A directory that is gone with the value.
    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let path = std::env::temp_dir().join(format!("vnetctl-gvproxy-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            for (file, text) in files {
                std::fs::write(path.join(file), text).unwrap();
            }
            Self(path)
        }

        /// `DIR` in an argument is this directory.
        fn load(&self, arguments: &[&str]) -> Result<Loaded, String> {
            let here = self.0.display().to_string();
            let words = arguments.iter().map(|word| word.replace("DIR", &here).into());
            let shown = |failure: Failure| {
                assert_eq!(failure.exit_code(), 1);
                failure.to_string().replace(&here, "DIR")
            };
            load(&Flags::parse(words).unwrap(), &[]).map_err(shown)
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_policy_inside_the_file_is_checked_at_its_place_and_finds_its_lists() {
        let wrong = "stack:\n  networkPolicy:\n    defaultAction: Deny\n    rules:\n      - action: allow\n        cidr: 10.0.0.1/8\n";
        let right = "stack:\n  networkPolicy:\n    sets: {ads: {file: ads.txt, format: plain}}\n    defaultAction: deny\n    dns: {defaultAction: allow, \
                     blockedDomains: [\"@ads\"]}\n  mtu: 1400\n";
        let directory = Directory::new(
            "inline",
            &[
                ("wrong.yaml", wrong),
                ("right.yaml", right),
                ("ads.txt", "ads.example\n"),
            ],
        );

        let refused = directory.load(&["-config", "DIR/wrong.yaml"]).unwrap_err();
        let loaded = directory
            .load(&["-config", "DIR/right.yaml", "-listen-stdio=accept"])
            .unwrap();

        assert_eq!(
            refused
                .lines()
                .map(|line| line.trim().split(" (").next().unwrap())
                .collect::<Vec<_>>(),
            [
                "DIR/wrong.yaml:3:20: defaultAction is \"Deny\"",
                "DIR/wrong.yaml:6:15: cidr: 10.0.0.1/8 has bits set beyond its prefix length",
            ]
        );
        let policy = loaded.policy.unwrap();
        assert_eq!(policy.lists.len(), 1);
        assert!(!policy.text.contains("mtu"), "{}", policy.text);
        assert_eq!(loaded.config.stack.mtu_bytes, 1400);
    }

    #[test]
    fn names_in_the_file_become_a_policy_or_are_refused_at_their_line() {
        let directory = Directory::new(
            "names",
            &[
                (
                    "wrong.yaml",
                    "stack:\n  outboundAllow:\n    - ^a\\.test$\n    - \"(\"\n",
                ),
                (
                    "right.yaml",
                    "stack:\n  outboundAllow:\n    - ^a\\.test$\n    - b\\.test\n",
                ),
            ],
        );

        let refused = directory.load(&["-config", "DIR/wrong.yaml"]).unwrap_err();
        let loaded = directory
            .load(&["-config", "DIR/right.yaml", "-listen-stdio=accept"])
            .unwrap();

        assert!(
            refused.starts_with("DIR/wrong.yaml:4:7: outboundAllow: \"(\" is not an expression"),
            "{refused}"
        );
        assert!(loaded.policy.is_some());
        // An expression that is not between ^ and $ is told, in its line.
        assert_eq!(loaded.warnings.len(), 1, "{:?}", loaded.warnings);
        assert!(
            loaded.warnings[0].contains("right.yaml:4:7: outboundAllow: "),
            "{:?}",
            loaded.warnings
        );
    }

    #[test]
    fn a_policy_of_its_own_is_read_and_what_cannot_be_read_is_named() {
        let directory = Directory::new(
            "files",
            &[
                ("c.yaml", "interfaces: {stdio: accept}\nlisen: x\n"),
                ("p.yaml", "version: 1\ndefaultAction: deny\n"),
                ("empty.yaml", "\n"),
            ],
        );

        let loaded = directory
            .load(&["-config=DIR/c.yaml", "-network-policy=DIR/p.yaml"])
            .unwrap();

        assert_eq!(loaded.policy.unwrap().text, "version: 1\ndefaultAction: deny\n");
        assert_eq!(loaded.warnings.len(), 1);
        assert!(
            loaded.warnings[0].starts_with("warning: "),
            "{:?}",
            loaded.warnings
        );
        assert!(
            loaded.warnings[0].ends_with("(did you mean listen?)"),
            "{:?}",
            loaded.warnings
        );
        for (arguments, expected) in [
            (
                &["-config=DIR/none.yaml"][..],
                "-config DIR/none.yaml cannot be read: No such file or directory (os error 2) (name one that is there)",
            ),
            (
                &["-config=DIR"],
                "-config DIR cannot be read: Is a directory (os error 21) (name a file)",
            ),
            (
                &["-network-policy=DIR/none.yaml"],
                "-network-policy: cannot read policy DIR/none.yaml: No such file or directory (os error 2) (name one that is \
                 there)",
            ),
            (
                &["-network-policy=DIR/empty.yaml"],
                "-network-policy: DIR/empty.yaml: the document is empty",
            ),
            (
                &["-strict", "-config=DIR/c.yaml"],
                "DIR/c.yaml:2:1: key \"lisen\" is not known in the file (did you mean listen?)",
            ),
        ] {
            let refused = directory.load(arguments).unwrap_err();
            assert!(refused.starts_with(expected), "{refused}");
        }
    }

    #[test]
    fn sockets_and_identities_are_looked_for_on_the_host() {
        let directory = Directory::new("host", &[("there", "")]);
        // Of a process that was killed, and of one that serves.
        drop(std::os::unix::net::UnixListener::bind(directory.0.join("dead")).unwrap());
        let _served = std::os::unix::net::UnixListener::bind(directory.0.join("served")).unwrap();
        assert!(directory.load(&["-listen-qemu=unix://DIR/dead"]).is_ok());
        let refused = directory.load(&["-listen-qemu=unix://DIR/served"]).unwrap_err();
        let own = format!(
            "(pid {}) listens there; end it, or listen elsewhere",
            std::process::id()
        );
        assert!(refused.contains("DIR/served\" already exists, and "), "{refused}");
        assert!(
            refused.contains(&own) || cfg!(not(target_os = "linux")),
            "{refused}"
        );

        let refused = directory
            .load(&[
                "-listen-qemu=unix://DIR/there",
                "-listen-vfkit=unixgram://DIR/free",
                "-forward-sock=a",
                "-forward-dest=/b",
                "-forward-user=c",
                "-forward-identity=DIR/gone",
            ])
            .unwrap_err();

        let lines: Vec<&str> = refused.lines().collect();
        assert_eq!(lines.len(), 2, "{refused}");
        assert!(
            lines[0].starts_with("-listen-qemu: \"DIR/there\" already exists"),
            "{refused}"
        );
        assert!(
            lines[1].contains("identity file \"DIR/gone\" can't be loaded: there is no such file"),
            "{refused}"
        );
    }
}
