//! The host's resolver settings: a file of the form of resolv.conf(5), followed as it changes.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use vnet_proto::model::Name;

/// Where hosts keep it.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";
/// How often the file is looked at, at most.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Bytes read of the file. A longer one is not a resolver's.
const FILE_BYTES_MAX: usize = 64 * 1024;
/// Search domains taken, as glibc since 2.26 has no limit and DHCP's message does.
const SEARCH_MAX: usize = 32;
const DNS_PORT: u16 = 53;

/// What the file says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostResolver {
    /// Name servers, in order.
    pub servers: Vec<SocketAddr>,
    /// Domains tried for short names, in order.
    pub search_domains: Vec<Name>,
}

impl HostResolver {
    /// Reads the file. One that cannot be read says nothing.
    pub fn read(path: &Path) -> Self {
        let text = std::fs::read(path).unwrap_or_default();
        Self::parse(&String::from_utf8_lossy(&text[..text.len().min(FILE_BYTES_MAX)]))
    }

    /// Reads the text. What is not understood is left out, as every resolver does.
    pub fn parse(text: &str) -> Self {
        let mut found = Self::default();
        for line in text.lines() {
            let line = line.split(['#', ';']).next().unwrap_or_default();
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => found.servers.extend(words.next().and_then(server)),
                // The last such line counts.
                Some("search" | "domain") => {
                    found.search_domains = words.filter_map(|w| w.parse().ok()).take(SEARCH_MAX).collect();
                }
                _ => {}
            }
        }
        found
    }
}

/// A name server's address, with a zone for a link-local one.
fn server(text: &str) -> Option<SocketAddr> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(SocketAddr::new(address, DNS_PORT));
    }
    let (address, zone) = text.split_once('%')?;
    let address: Ipv6Addr = address.parse().ok()?;
    let scope = zone
        .parse()
        .ok()
        .or_else(|| nix::net::if_::if_nametoindex(zone).ok())?;
    Some(SocketAddrV6::new(address, DNS_PORT, 0, scope).into())
}

/// The file's servers, read again when it changed.
#[derive(Debug)]
pub(super) struct ResolvConf {
    path: PathBuf,
    servers: Vec<SocketAddr>,
    checked_at: Option<Instant>,
    stamp: Option<(SystemTime, u64)>,
}

impl ResolvConf {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            servers: Vec::new(),
            checked_at: None,
            stamp: None,
        }
    }

    pub(super) fn servers(&mut self) -> &[SocketAddr] {
        let now = Instant::now();
        if self
            .checked_at
            .is_none_or(|at| now.duration_since(at) >= CHECK_INTERVAL)
        {
            self.checked_at = Some(now);
            self.check();
        }
        &self.servers
    }

    /// Reads the file if it is another than the last time. A file that is gone or cannot be read for a moment,
    /// as while it is replaced, leaves the servers as they are.
    fn check(&mut self) {
        let Ok(found) = std::fs::metadata(&self.path) else {
            return;
        };
        let stamp = found.modified().ok().map(|modified| (modified, found.len()));
        // Times of files are coarse: one that changed just now may change again without showing it.
        let fresh =
            stamp.is_some_and(|(modified, _)| modified.elapsed().is_ok_and(|age| age < CHECK_INTERVAL * 2));
        if stamp.is_none() || stamp != self.stamp || fresh {
            self.stamp = stamp;
            self.servers = HostResolver::read(&self.path).servers;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_and_search_domains_are_read_as_resolvers_do() {
        let found = HostResolver::parse(
            "# made by hand\ndomain old.test\nnameserver 127.0.0.53\n  nameserver\t2001:db8::53 ; second\n\
             nameserver fe80::1%3\nnameserver nonsense\nnameserver\noptions edns0 trust-ad\n\
             search Corp.Example.com. example.com bad..name\nsortlist 10.0.0.0\n",
        );
        let text: Vec<String> = found.servers.iter().map(ToString::to_string).collect();
        assert_eq!(text, ["127.0.0.53:53", "[2001:db8::53]:53", "[fe80::1%3]:53"]);
        let domains: Vec<&str> = found.search_domains.iter().map(Name::as_str).collect();
        assert_eq!(domains, ["corp.example.com", "example.com"]);
    }

    #[test]
    fn a_changed_file_is_read_again_and_a_missing_one_changes_nothing() {
        let directory = std::env::temp_dir().join(format!("vnet-resolv-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("resolv.conf");
        let mut conf = ResolvConf::new(path.clone());
        let look_later = |conf: &mut ResolvConf| {
            conf.checked_at = None;
            conf.servers().to_vec()
        };
        assert!(look_later(&mut conf).is_empty());
        std::fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        assert!(conf.servers().is_empty(), "not looked at more than once a second");
        assert_eq!(look_later(&mut conf), ["192.0.2.1:53".parse().unwrap()]);
        std::fs::write(&path, "nameserver 192.0.2.2\n").unwrap();
        assert_eq!(look_later(&mut conf), ["192.0.2.2:53".parse().unwrap()]);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(look_later(&mut conf), ["192.0.2.2:53".parse().unwrap()]);
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
