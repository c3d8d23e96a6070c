//! gvproxy's command line, in the syntax of Go's package `flag`: one dash or two, `-x v` or `-x=v`, booleans
//! without a value, repeatable flags; `--` or the first word that is no flag ends the flags.
//!
//! Owns which flags there are and how they are written. What they mean together, and whether their values make
//! sense, is [`config`](super::config)'s. Values that are paths may be any bytes.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use crate::launch::nearest;

/// What was typed. A value that was given empty is one that was not given, as the peer has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flags {
    /// `-config`.
    pub config: Option<PathBuf>,
    /// `-listen`, each.
    pub listen: Vec<String>,
    /// `-services`.
    pub services: Option<String>,
    /// `-debug`.
    pub debug: bool,
    /// `-mtu`, in bytes.
    pub mtu: Option<i64>,
    /// `-ssh-port`; `None`: not given.
    pub ssh_port: Option<i64>,
    /// `-subnet`.
    pub subnet: Option<String>,
    /// `-gatewayIP`.
    pub gateway_ip: Option<String>,
    /// `-deviceIP`.
    pub device_ip: Option<String>,
    /// `-hostIP`.
    pub host_ip: Option<String>,
    /// `-listen-vpnkit`.
    pub listen_vpnkit: Option<String>,
    /// `-listen-qemu`.
    pub listen_qemu: Option<String>,
    /// `-listen-bess`.
    pub listen_bess: Option<String>,
    /// `-listen-stdio`: any text switches it on.
    pub listen_stdio: Option<String>,
    /// `-listen-vfkit`.
    pub listen_vfkit: Option<String>,
    /// `-forward-sock`, each.
    pub forward_sock: Vec<String>,
    /// `-forward-dest`, each.
    pub forward_dest: Vec<String>,
    /// `-forward-user`, each.
    pub forward_user: Vec<String>,
    /// `-forward-identity`, each.
    pub forward_identity: Vec<PathBuf>,
    /// `-pid-file`.
    pub pid_file: Option<PathBuf>,
    /// `-log-file`.
    pub log_file: Option<PathBuf>,
    /// `-pcap`.
    pub pcap: Option<PathBuf>,
    /// `-ec2-metadata-access`.
    pub ec2_metadata_access: bool,
    /// `-notification`.
    pub notification: Option<String>,
    /// `-version`.
    pub version: bool,
    /// `-secure-mode`.
    pub secure_mode: bool,
    /// `-network-policy`.
    pub network_policy: Option<PathBuf>,
    /// `-strict`.
    pub strict: bool,
    /// What stands after the flags. Nothing reads it, so that a flag among it is lost.
    pub rest: Vec<OsString>,
}

impl Flags {
    /// Reads the words after the program's name.
    ///
    /// # Errors
    /// The first thing that is wrong with them, or that help is asked for.
    pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, FlagError> {
        let mut flags = Self::default();
        let mut words = arguments.into_iter();
        while let Some(word) = words.next() {
            let (name, value) = match split(&word)? {
                Word::Flag { name, value } => (name.to_owned(), value.map(OsStr::to_owned)),
                Word::End => break,
                Word::Other => {
                    flags.rest.push(word);
                    break;
                }
            };
            let name = name.to_string_lossy();
            let Some(spec) = SPECS.iter().find(|spec| spec.name == name) else {
                return Err(match &*name {
                    "h" | "help" => FlagError::Help,
                    name => FlagError::unknown(name),
                });
            };
            let value = match (value, &spec.kind) {
                (None, Kind::Bool(_)) => OsString::from("true"),
                (None, _) => words.next().ok_or(FlagError::NoValue(spec.name))?,
                (Some(value), _) => value,
            };
            spec.set(&mut flags, value)?;
        }
        flags.rest.extend(words);
        Ok(flags)
    }
}

/// What stops the command line from being read, in the words of Go's `flag`, on which scripts may rely.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FlagError {
    /// `-h` or `-help`: nothing is wrong.
    #[error("flag: help requested")]
    Help,
    /// No name, or one that starts with a dash or an equals sign.
    #[error("bad flag syntax: {0}")]
    Syntax(String),
    /// There is no such flag, and none that is near.
    #[error("flag provided but not defined: -{0}")]
    Unknown(String),
    /// There is no such flag, but one that is near.
    #[error("flag provided but not defined: -{found} (did you mean -{near}?)")]
    Misspelt {
        /// As typed.
        found: String,
        /// What was probably meant.
        near: &'static str,
    },
    /// The last word is a flag that takes a value.
    #[error("flag needs an argument: -{0}")]
    NoValue(&'static str),
    /// Not one of Go's booleans.
    #[error("invalid boolean value {found:?} for -{flag}: parse error (expected true or false)")]
    Bool {
        /// Whose.
        flag: &'static str,
        /// As typed.
        found: String,
    },
    /// Not a number in Go's syntax.
    #[error("invalid value {found:?} for flag -{flag}: parse error (expected a whole number)")]
    Number {
        /// Whose.
        flag: &'static str,
        /// As typed.
        found: String,
    },
    /// A number that 64 bits do not hold.
    #[error("invalid value {found:?} for flag -{flag}: value out of range")]
    Range {
        /// Whose.
        flag: &'static str,
        /// As typed.
        found: String,
    },
    /// Nothing, where that would take a restriction away.
    #[error(
        "invalid value \"\" for flag -{0}: it is empty, which would be none (leave the flag out for none)"
    )]
    Empty(&'static str),
    /// Bytes that are no text, where text is needed.
    #[error("invalid value {found:?} for flag -{flag}: not UTF-8")]
    Text {
        /// Whose.
        flag: &'static str,
        /// As typed.
        found: OsString,
    },
}

impl FlagError {
    /// The status that the process ends with: 0 where help was asked for, else 2.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Help => 0,
            _ => crate::failure::EXIT_USAGE,
        }
    }

    /// What goes to stderr: the error's line, if anything is wrong, and the usage. Ends with a line feed.
    pub fn whole(&self, program: &str) -> String {
        match self {
            Self::Help => usage(program),
            wrong => format!("{wrong}\n{}", usage(program)),
        }
    }

    fn unknown(found: &str) -> Self {
        let names: Vec<&'static str> = SPECS.iter().map(|spec| spec.name).collect();
        match nearest(found, &names) {
            Some(near) => Self::Misspelt {
                found: found.to_owned(),
                near,
            },
            None => Self::Unknown(found.to_owned()),
        }
    }
}

/// Every flag, in the form of Go's `PrintDefaults`. Ends with a line feed.
pub fn usage(program: &str) -> String {
    let mut specs: Vec<&Spec> = SPECS.iter().collect();
    specs.sort_by_key(|spec| spec.name);
    let mut text = format!("Usage of {program}:\n");
    for spec in specs {
        let value = match spec.kind {
            Kind::Bool(_) => "",
            Kind::Number(_) => " int",
            Kind::Text(_) | Kind::Path(_) | Kind::OnePath(_) => " string",
            Kind::Texts(_) | Kind::Paths(_) => " value",
        };
        let _ = write!(text, "  -{}{value}\n    \t{}", spec.name, spec.help);
        if !spec.default.is_empty() {
            let _ = write!(text, " (default {})", spec.default);
        }
        text.push('\n');
    }
    text
}

/// Every flag's name, without dashes.
pub fn names() -> impl Iterator<Item = &'static str> {
    SPECS.iter().map(|spec| spec.name)
}

/// Why a text is not a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NumberError {
    /// It is not written as one.
    Syntax,
    /// It does not fit.
    Range,
}

/// A whole number as Go writes it: decimal, `0x`, `0o`, `0b`, or octal behind a zero, with underscores between
/// digits.
pub(super) fn go_number(text: &str) -> Result<i64, NumberError> {
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let minus = if text.starts_with('-') { "-" } else { "" };
    let lower = unsigned.to_ascii_lowercase();
    let (radix, digits) = match lower.get(..2) {
        Some("0x") => (16, &lower[2..]),
        Some("0o") => (8, &lower[2..]),
        Some("0b") => (2, &lower[2..]),
        Some(_) if lower.starts_with('0') => (8, &lower[1..]),
        _ => (10, &lower[..]),
    };
    // A prefix counts as a digit: 0x_1f and 0_7 are numbers.
    let after_prefix = if radix == 10 {
        Some(digits)
    } else {
        digits.strip_prefix('_').or(Some(digits))
    };
    let parts = after_prefix.unwrap_or_default().split('_');
    let is_digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric());
    if !parts.clone().all(is_digits) {
        return Err(NumberError::Syntax);
    }
    let plain: String = std::iter::once(minus).chain(parts).collect();
    i64::from_str_radix(&plain, radix).map_err(|error| match error.kind() {
        std::num::IntErrorKind::PosOverflow | std::num::IntErrorKind::NegOverflow => NumberError::Range,
        _ => NumberError::Syntax,
    })
}

/// One word of the command line.
enum Word<'a> {
    Flag {
        name: &'a OsStr,
        value: Option<&'a OsStr>,
    },
    /// `--`.
    End,
    /// No flag.
    Other,
}

fn split(word: &OsStr) -> Result<Word<'_>, FlagError> {
    let bytes = word.as_bytes();
    let body = match bytes {
        b"--" => return Ok(Word::End),
        [b'-', b'-', body @ ..] | [b'-', body @ ..] if !body.is_empty() => body,
        _ => return Ok(Word::Other),
    };
    if matches!(body[0], b'-' | b'=') {
        return Err(FlagError::Syntax(word.to_string_lossy().into_owned()));
    }
    let (name, value) = match body.iter().position(|b| *b == b'=') {
        Some(at) => (&body[..at], Some(OsStr::from_bytes(&body[at + 1..]))),
        None => (body, None),
    };
    Ok(Word::Flag {
        name: OsStr::from_bytes(name),
        value,
    })
}

/// A flag.
struct Spec {
    name: &'static str,
    kind: Kind,
    help: &'static str,
    /// As the usage shows it.
    default: &'static str,
}

/// What a flag takes, and where it goes.
enum Kind {
    Bool(fn(&mut Flags) -> &mut bool),
    Number(fn(&mut Flags) -> &mut Option<i64>),
    Text(fn(&mut Flags) -> &mut Option<String>),
    Texts(fn(&mut Flags) -> &mut Vec<String>),
    Path(fn(&mut Flags) -> &mut Option<PathBuf>),
    /// One that is there: what it restricts would be open without.
    OnePath(fn(&mut Flags) -> &mut Option<PathBuf>),
    Paths(fn(&mut Flags) -> &mut Vec<PathBuf>),
}

impl Spec {
    fn set(&self, flags: &mut Flags, value: OsString) -> Result<(), FlagError> {
        let flag = self.name;
        let text = |value: OsString| {
            value
                .into_string()
                .map_err(|found| FlagError::Text { flag, found })
        };
        match self.kind {
            Kind::Bool(slot) => {
                let value = text(value)?;
                *slot(flags) = match &*value {
                    "1" | "t" | "T" | "true" | "TRUE" | "True" => true,
                    "0" | "f" | "F" | "false" | "FALSE" | "False" => false,
                    _ => return Err(FlagError::Bool { flag, found: value }),
                };
            }
            Kind::Number(slot) => {
                let found = text(value)?;
                *slot(flags) = Some(go_number(&found).map_err(|error| match error {
                    NumberError::Syntax => FlagError::Number { flag, found },
                    NumberError::Range => FlagError::Range { flag, found },
                })?);
            }
            Kind::Text(slot) => *slot(flags) = Some(text(value)?).filter(|value| !value.is_empty()),
            Kind::Texts(slot) => slot(flags).push(text(value)?),
            Kind::Path(slot) => *slot(flags) = Some(path(value)).filter(|p| !p.as_os_str().is_empty()),
            Kind::OnePath(_) if value.is_empty() => return Err(FlagError::Empty(flag)),
            Kind::OnePath(slot) => *slot(flags) = Some(path(value)),
            Kind::Paths(slot) => slot(flags).push(path(value)),
        }
        Ok(())
    }
}

fn path(value: OsString) -> PathBuf {
    OsString::from_vec(value.into_vec()).into()
}

const fn spec(name: &'static str, kind: Kind, help: &'static str) -> Spec {
    Spec {
        name,
        kind,
        help,
        default: "",
    }
}

impl Spec {
    const fn or(self, default: &'static str) -> Self {
        Self { default, ..self }
    }
}

/// Every flag.
const SPECS: [Spec; 28] = [
    spec("config", Kind::Path(|f| &mut f.config), "YAML file with the configuration; flags override what they say too"),
    spec("listen", Kind::Texts(|f| &mut f.listen), "URL of a socket with the services API and /connect; may be repeated"),
    spec("services", Kind::Text(|f| &mut f.services), "URL of a socket with the services API and no /connect"),
    spec("debug", Kind::Bool(|f| &mut f.debug), "log at level debug"),
    spec("mtu", Kind::Number(|f| &mut f.mtu), "MTU of the guests' links in bytes, 576 to 65520").or("1500"),
    spec(
        "ssh-port",
        Kind::Number(|f| &mut f.ssh_port),
        "port of the host's 127.0.0.1 that leads to the guest's port 22, 1024 to 65535; -1 for none; not with -config",
    )
    .or("2222"),
    spec("subnet", Kind::Text(|f| &mut f.subnet), "subnet of the guests, /29 or larger").or("\"192.168.127.0/24\""),
    spec("gatewayIP", Kind::Text(|f| &mut f.gateway_ip), "address of the gateway; else the subnet's first"),
    spec("deviceIP", Kind::Text(|f| &mut f.device_ip), "address of the first guest; else the subnet's second"),
    spec("hostIP", Kind::Text(|f| &mut f.host_ip), "address that leads to the host; else the subnet's last"),
    spec("listen-vpnkit", Kind::Text(|f| &mut f.listen_vpnkit), "URL of the socket for HyperKit's vpnkit protocol"),
    spec("listen-qemu", Kind::Text(|f| &mut f.listen_qemu), "URL of the socket for QEMU's -netdev stream"),
    spec("listen-bess", Kind::Text(|f| &mut f.listen_bess), "unixpacket:// URL of the socket for User Mode Linux and BESS"),
    spec("listen-stdio", Kind::Text(|f| &mut f.listen_stdio), "serve a guest on standard input and output; say accept"),
    spec("listen-vfkit", Kind::Text(|f| &mut f.listen_vfkit), "unixgram:// URL of the socket for vfkit and krunkit"),
    spec("forward-sock", Kind::Texts(|f| &mut f.forward_sock), "socket of the host that leads to one of the guest over SSH; may be repeated"),
    spec("forward-dest", Kind::Texts(|f| &mut f.forward_dest), "the guest's socket, for each -forward-sock"),
    spec("forward-user", Kind::Texts(|f| &mut f.forward_user), "the guest's user, for each -forward-sock"),
    spec("forward-identity", Kind::Paths(|f| &mut f.forward_identity), "the file with the private key, for each -forward-sock"),
    spec("pid-file", Kind::Path(|f| &mut f.pid_file), "file to write the process's id to"),
    spec("log-file", Kind::Path(|f| &mut f.log_file), "file to write the log to, rather than standard error"),
    spec("pcap", Kind::Path(|f| &mut f.pcap), "file to capture packets to"),
    spec("ec2-metadata-access", Kind::Bool(|f| &mut f.ec2_metadata_access), "let guests reach 169.254.0.0/16"),
    spec("notification", Kind::Text(|f| &mut f.notification), "unix:// URL of a socket that is told what happens"),
    spec("version", Kind::Bool(|f| &mut f.version), "print the version"),
    spec("secure-mode", Kind::Bool(|f| &mut f.secure_mode), "ask before anything goes out that no rule decides"),
    spec("network-policy", Kind::OnePath(|f| &mut f.network_policy), "policy file for the guests"),
    spec("strict", Kind::Bool(|f| &mut f.strict), "refuse unknown keys in the -config file rather than warn of them"),
];

#[cfg(test)]
mod tests;
