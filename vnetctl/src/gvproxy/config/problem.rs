//! What can be wrong with a configuration, and what is to be said of one that is not. Each names the flag or the key,
//! what was found, and the remedy.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use ipnet::Ipv4Net;
use vnet_proto::model::{NameError, PatternError};

use super::LogLevel;
use super::endpoint::{Endpoint, EndpointError};
use crate::gvproxy::origin::{Finding, Origin};
use crate::launch::write_lines;

/// A path as a shell reads it: in quotes where it has to be.
fn shell_word(path: &Path) -> String {
    let text = path.to_string_lossy();
    // No path has a NUL, which is what cannot be quoted.
    shlex::try_quote(&text).map_or_else(|_| text.to_string(), |word| word.into_owned())
}

/// One thing that is wrong.
#[derive(Debug, thiserror::Error)]
#[allow(
    missing_docs,
    reason = "each message says what the variant and its fields are"
)]
pub enum Problem {
    #[error("{from} {found:?}")]
    Endpoint {
        from: Origin,
        found: String,
        #[source]
        source: EndpointError,
    },
    #[error("{from} {at}: {other} listens there too; give each a place of its own")]
    ListenTwice {
        from: Origin,
        at: Endpoint,
        other: Origin,
    },
    #[error(
        "{from}: {path:?} already exists{}, or listen elsewhere",
        .by.as_ref().map_or_else(
            || "; remove it if nothing listens there any more".to_owned(),
            |by| format!(", and {by} listens there; end it"),
        )
    )]
    Exists {
        from: Origin,
        path: PathBuf,
        /// What listens there, where it is known.
        by: Option<String>,
    },
    #[error(
        "{from}: {} cannot be made, as its directory is not there; run: mkdir -p {}",
        path.display(),
        shell_word(directory)
    )]
    NoDirectory {
        from: Origin,
        path: PathBuf,
        directory: PathBuf,
    },
    #[error("{first} and {second} cannot be used at the same time; leave one of them out")]
    Exclusive { first: Origin, second: Origin },
    #[error("{from} {found} is out of range (expected 576 to 65520, or 0 for 1500)")]
    Mtu { from: Origin, found: i64 },
    #[error("-ssh-port {0} is out of range (expected 1024 to 65535, or -1 for none)")]
    SshPort(i64),
    #[error("{from} {found:?} is not an IPv4 subnet (expected one as 192.168.127.0/24)")]
    Subnet { from: Origin, found: String },
    #[error("{from} {found} is too small or too large for guests (expected /8 to /29)")]
    SubnetSize { from: Origin, found: Ipv4Net },
    #[error(
        "{from} {found} cannot be a network of guests: it is loopback, link-local, multicast or reserved"
    )]
    SubnetKind { from: Origin, found: Ipv4Net },
    #[error("{from} {found:?} is not an IPv4 address (expected one as 192.168.127.2)")]
    Ipv4 { from: Origin, found: String },
    #[error("{from} {found:?} is not an address (expected one as 192.168.127.2)")]
    Ip { from: Origin, found: String },
    #[error("{from} {found} is not in the subnet {subnet}; give one from there, or another subnet")]
    NotInSubnet {
        from: Origin,
        found: Ipv4Addr,
        subnet: Ipv4Net,
    },
    #[error(
        "{from} {found} is the subnet's own address or its broadcast address; give another from {subnet}"
    )]
    Reserved {
        from: Origin,
        found: Ipv4Addr,
        subnet: Ipv4Net,
    },
    #[error("{from} {found} is {other} as well; the addresses must be distinct")]
    Taken {
        from: Origin,
        found: Ipv4Addr,
        other: Origin,
    },
    #[error("{from}: {found} is the {owner}'s address; keep another for this MAC address")]
    LeaseTaken {
        from: Origin,
        found: Ipv4Addr,
        owner: &'static str,
    },
    #[error("{from} {found:?} is not a MAC address of one station (expected one as 5a:94:ef:e4:0c:ee)")]
    Mac { from: Origin, found: String },
    #[error("{from}: {mac} has the address {other} already; each MAC address takes one")]
    MacTwice {
        from: Origin,
        mac: String,
        other: Ipv4Addr,
    },
    #[error("{from}: {found:?} is not a VM's UUID (expected 1 to 36 printable characters)")]
    Uuid { from: Origin, found: String },
    #[error("{from}: {found:?} is not a place to listen (expected HOST:PORT, :PORT or udp:HOST:PORT)")]
    ForwardListen { from: Origin, found: String },
    #[error("{from}: port {port} is out of range (expected 0 to 65535, 0 for any that is free)")]
    ForwardPort { from: Origin, port: String },
    #[error("{from}: {found:?} is not a place in the network (expected ADDRESS:PORT, as 192.168.127.2:22)")]
    ForwardGuest { from: Origin, found: String },
    #[error("{from}: {other} listens there too; leave one of them out")]
    ForwardTwice { from: Origin, other: Origin },
    #[error("stack.forwards has {found} entries (at most {most})")]
    ForwardMany { found: usize, most: usize },
    #[error("{from} {found:?} is not a name")]
    Name {
        from: Origin,
        found: String,
        #[source]
        source: NameError,
    },
    #[error("{0} has neither name nor regexp; give one of them")]
    RecordNameless(Origin),
    #[error("{from} {found:?} is not a pattern that can be used")]
    Pattern {
        from: Origin,
        found: String,
        #[source]
        source: PatternError,
    },
    #[error("{from} has {found} records (at most {most})")]
    RecordMany { from: Origin, found: usize, most: usize },
    #[error("stack.dns has {found} {what} (at most {most})")]
    ZoneMany {
        what: &'static str,
        found: usize,
        most: usize,
    },
    #[error(
        "-forward-sock is given {socks} times, -forward-dest {dests}, -forward-user {users}, -forward-identity {identities}; \
         each forward takes one of each"
    )]
    ForwardFlags {
        socks: usize,
        dests: usize,
        users: usize,
        identities: usize,
    },
    #[error("{from} has no {key}; a forward over SSH takes socket, dest, user and identity")]
    SshIncomplete { from: Origin, key: &'static str },
    #[error("{from} {found:?} is a named pipe, which only Windows has; give a path or unix:///PATH")]
    NamedPipe { from: Origin, found: String },
    #[error("{from} {found:?} is not a socket of the guest (expected an absolute path)")]
    SshDest { from: Origin, found: String },
    #[error(
        "{from}: identity file {path:?} can't be loaded: there is no such file; give that of a private key"
    )]
    NoIdentity { from: Origin, path: PathBuf },
    #[error("{from}: identity file {path:?} can't be loaded")]
    Identity {
        from: Origin,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("-secure-mode asks for what {0} closes without asking; leave one of them out")]
    Modes(Origin),
    #[error(
        "{0} and stack.outboundAllow cannot both be given; write the expressions into networkPolicy.outboundAllow"
    )]
    Policies(Origin),
    #[error("-network-policy - reads standard input, where {0} has the guest's frames; give a file")]
    PolicyFromFrames(Origin),
    #[error("{0} more problems are not shown")]
    More(usize),
}

/// Something that is to be said, though it works.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[allow(
    missing_docs,
    reason = "each message says what the variant and its fields are"
)]
pub enum Warning {
    #[error("{0}")]
    File(Finding),
    #[error("nothing reads {0:?} and what stands after it, since it is no flag's value; leave it out")]
    Rest(String),
    #[error("-{flag} {found} is not used, since {key} is given; leave one of them out")]
    Overruled {
        flag: &'static str,
        found: String,
        key: Origin,
    },
    #[error(
        "-ssh-port is not used with -config; write \"127.0.0.1:{port}\": \"{guest}:22\" under stack.forwards instead"
    )]
    SshPortUnused { port: i64, guest: Ipv4Addr },
    #[error(
        "{from} {found:?} is not a level (expected panic, fatal, error, warning, info, debug or trace); {} is used",
        LogLevel::default()
    )]
    LogLevel { from: Origin, found: String },
    #[error("{from} {found} is more than a frame carries; {used} is used")]
    MtuLowered { from: Origin, found: i64, used: u16 },
    #[error("{from}: {guest} is not in the subnet {subnet}, where no guest answers")]
    ForwardOutside {
        from: Origin,
        guest: IpAddr,
        subnet: Ipv4Net,
    },
    #[error("{from}: {other} is of the same name and answers first, so that this one is left out")]
    ZoneTwice { from: Origin, other: Origin },
    #[error(
        "{from} is never asked: {other} comes before it and answers for all its names; put it before that one"
    )]
    ZoneHidden { from: Origin, other: Origin },
    #[error("{from}: only the first {most} of {found} search domains are handed out")]
    SearchMany { from: Origin, found: usize, most: usize },
    #[error("{0} is not used, since -network-policy is given")]
    PolicyReplaced(Origin),
    #[error(
        "no guest can attach: neither -listen nor one of -listen-qemu, -listen-vfkit and their kin is given"
    )]
    NoLink,
    #[error("{0} more warnings are not shown")]
    More(usize),
}

/// Everything that is wrong.
#[derive(Debug)]
pub struct Problems(pub Vec<Problem>);

impl std::fmt::Display for Problems {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write_lines(&self.0, f)
    }
}

impl std::error::Error for Problems {}
