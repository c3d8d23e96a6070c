//! What the controlplane is told at its start: flags, checked whole into one [`Config`].

use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Parser;

use crate::paths::{self, PathError};
use crate::store::Location;

/// Decides what the guests of vnet's dataplanes may reach, and asks people.
#[derive(Debug, Clone, Parser)]
#[command(name = "vnet-controlplane", version, about, long_about = None, after_help = EXAMPLES)]
pub struct Args {
    /// Where the API listens: unix:///PATH [default: the user's own control.sock]
    #[arg(long, value_name = "URL")]
    pub listen: Vec<String>,

    /// Where dataplanes connect: unix:///PATH, or fd://N for an inherited socket [default: session.sock beside]
    #[arg(long, value_name = "URL")]
    pub session_listen: Vec<String>,

    /// Where state is kept: sqlite:FILE or memory: [default: sqlite: in the user's state directory]
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,

    /// Where history is kept, if not in the store: sqlite:FILE
    #[arg(long, value_name = "URL")]
    pub history: Option<String>,

    /// The policy of VMs that no other policy claims; read again on SIGHUP
    #[arg(long, value_name = "FILE")]
    pub network_policy: Option<PathBuf>,

    /// Ask before anything is let out that no rule decides (mode `ask`), for VMs without a mode of their own
    #[arg(long)]
    pub secure_mode: bool,

    /// End after so many seconds with no dataplane and no client connected
    #[arg(long, value_name = "SECONDS")]
    pub idle_exit: Option<u64>,

    /// End at once, with success, if another controlplane already serves these sockets
    #[arg(long)]
    pub if_absent: bool,

    /// How much is logged to stderr: error, warn, info, debug, trace, or a tracing filter
    #[arg(long, value_name = "LEVEL", env = "RUST_LOG", default_value = "info")]
    pub log_level: String,
}

const EXAMPLES: &str = "\
Examples:
  vnet-controlplane --secure-mode
  vnet-controlplane --listen unix:///run/vnet/control.sock --session-listen unix:///run/vnet/session.sock \\
      --store sqlite:/var/lib/vnet/state.db --network-policy /etc/vnet/policy.yaml";

/// Everything the controlplane is told at its start, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the API listens.
    pub listen: Vec<Endpoint>,
    /// Where dataplanes connect.
    pub session_listen: Vec<Endpoint>,
    /// Where state is kept.
    pub store: Location,
    /// Where history is kept; `None` is in the store.
    pub history: Option<Location>,
    /// The file of policy `default`.
    pub network_policy: Option<PathBuf>,
    /// VMs without a mode of their own are in mode `ask`.
    pub secure_mode: bool,
    /// End after so long with nothing attached.
    pub idle_exit: Option<Duration>,
    /// End with success if another controlplane already serves.
    pub if_absent: bool,
    /// A tracing filter.
    pub log_level: String,
}

/// Where something listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix stream socket.
    Unix(PathBuf),
    /// An inherited descriptor: a listening socket, or one end of a connected pair.
    Fd(RawFd),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Fd(fd) => write!(f, "fd://{fd}"),
        }
    }
}

/// Why an endpoint is refused.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// TCP without TLS.
    #[error("{0} needs TLS, which is not built yet; listen on unix:///PATH")]
    Tcp(String),
    /// Another form.
    #[error("{0:?} is not where something can listen (expected unix:///PATH or fd://N)")]
    Form(String),
    /// A relative path.
    #[error("socket path {0:?} is relative (expected unix:///PATH)")]
    Relative(String),
    /// A standard stream.
    #[error("descriptor {0} is a standard stream (expected 3 or above)")]
    Standard(RawFd),
    /// A path that no socket can have.
    #[error(transparent)]
    Path(#[from] PathError),
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        if let Some(path) = text
            .strip_prefix("unix://")
            .or_else(|| text.strip_prefix("unix:"))
        {
            if !path.starts_with('/') {
                return Err(EndpointError::Relative(path.to_owned()));
            }
            paths::check_socket_path(path.as_ref())?;
            Ok(Self::Unix(path.into()))
        } else if let Some(number) = text.strip_prefix("fd://") {
            let fd: RawFd = number.parse().map_err(|_| EndpointError::Form(text.to_owned()))?;
            if fd > 2 {
                Ok(Self::Fd(fd))
            } else {
                Err(EndpointError::Standard(fd))
            }
        } else if text.starts_with("tcp://") || text.starts_with("http") {
            Err(EndpointError::Tcp(text.to_owned()))
        } else {
            Err(EndpointError::Form(text.to_owned()))
        }
    }
}

/// Every problem of a configuration.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct ConfigError(pub Vec<String>);

impl TryFrom<Args> for Config {
    type Error = ConfigError;

    fn try_from(args: Args) -> Result<Self, ConfigError> {
        let mut problems = Vec::new();
        let mut endpoints = |flag: &str, texts: &[String]| -> Vec<Endpoint> {
            let mut good = Vec::new();
            for text in texts {
                match text.parse::<Endpoint>() {
                    Ok(endpoint) => good.push(endpoint),
                    Err(e) => problems.push(format!("{flag}: {e}")),
                }
            }
            good
        };
        let mut listen = endpoints("--listen", &args.listen);
        let mut session_listen = endpoints("--session-listen", &args.session_listen);
        if args.listen.is_empty() {
            listen.push(Endpoint::Unix(paths::control_socket()));
        }
        if args.session_listen.is_empty() {
            session_listen.push(match listen.first() {
                Some(Endpoint::Unix(path)) => Endpoint::Unix(path.with_file_name(paths::SESSION_SOCKET)),
                _ => Endpoint::Unix(paths::session_socket()),
            });
        }
        if let Some(both) = listen.iter().find(|l| session_listen.contains(l)) {
            problems.push(format!(
                "{both} is given for the API and for sessions; give each its own"
            ));
        }

        let store = match &args.store {
            Some(text) => text.parse::<Location>().map_err(|e| format!("--store: {e}")),
            None => paths::state_dir()
                .map(|dir| Location::Sqlite(dir.join(paths::STATE_FILE)))
                .map_err(|e| format!("{e}, or give --store sqlite:FILE or --store memory:")),
        };
        let history = match &args.history {
            Some(text) => text
                .parse::<Location>()
                .map(Some)
                .map_err(|e| format!("--history: {e}")),
            None => Ok(None),
        };
        if args.idle_exit == Some(0) {
            problems.push("--idle-exit is 0 (expected at least 1 second)".to_owned());
        }
        let mut taken = |result: Result<Location, String>| match result {
            Ok(location) => location,
            Err(problem) => {
                problems.push(problem);
                Location::Memory
            }
        };
        let store = taken(store);
        let history = history.unwrap_or_else(|problem| Some(taken(Err(problem))));
        if !problems.is_empty() {
            return Err(ConfigError(problems));
        }
        Ok(Self {
            listen,
            session_listen,
            // One file has one writer: naming the store again is the same as not naming it.
            history: history.filter(|location| *location != store),
            store,
            network_policy: args.network_policy,
            secure_mode: args.secure_mode,
            idle_exit: args.idle_exit.map(Duration::from_secs),
            if_absent: args.if_absent,
            log_level: args.log_level,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(args: &[&str]) -> Result<Config, String> {
        let args = std::iter::once("vnet-controlplane").chain(args.iter().copied());
        Args::try_parse_from(args)
            .unwrap()
            .try_into()
            .map_err(|e: ConfigError| e.to_string())
    }

    #[test]
    fn session_socket_lies_beside_the_api_socket() {
        let config = config(&["--listen", "unix:///run/x/a.sock", "--store", "memory:"]).unwrap();
        assert_eq!(config.listen, [Endpoint::Unix("/run/x/a.sock".into())]);
        assert_eq!(
            config.session_listen,
            [Endpoint::Unix("/run/x/session.sock".into())]
        );
        assert_eq!(config.store, Location::Memory);
    }

    #[test]
    fn every_problem_is_named_at_once() {
        let problems = config(&[
            "--listen",
            "tcp://0.0.0.0:1",
            "--session-listen",
            "tcp://0.0.0.0:2",
            "--store",
            "etcd://x",
            "--history",
            "file:x",
            "--idle-exit",
            "0",
        ])
        .unwrap_err();
        let lines: Vec<&str> = problems.lines().collect();
        assert_eq!(lines.len(), 5, "{problems}");
        assert!(lines[0].contains("--listen: tcp://0.0.0.0:1 needs TLS, which is not built yet"));
        assert!(lines[1].starts_with("--session-listen: tcp://"));
        assert!(problems.contains("etcd"), "{problems}");
    }

    #[test]
    fn one_socket_cannot_serve_both() {
        let both = config(&[
            "--listen",
            "unix:///x",
            "--session-listen",
            "unix:///x",
            "--store",
            "memory:",
        ]);
        assert!(both.unwrap_err().contains("give each its own"));
        assert!(matches!(
            "fd://2".parse::<Endpoint>(),
            Err(EndpointError::Standard(2))
        ));
        assert!(matches!(
            "unix:x".parse::<Endpoint>(),
            Err(EndpointError::Relative(_))
        ));
    }

    #[test]
    fn a_remedy_names_only_flags_that_its_program_has() {
        let text = PathError::NoHome.to_string();
        assert!(text.contains("XDG_STATE_HOME") && text.contains("HOME"), "{text}");
        // vnetctl says this too, and has no such flag.
        assert!(!text.contains("--store"), "{text}");
    }

    #[test]
    fn naming_the_store_as_history_is_one_file() {
        let config = config(&["--store", "sqlite:/x/s.db", "--history", "sqlite:/x/s.db"]).unwrap();
        assert_eq!(config.history, None);
    }
}
