//! What the dataplane says of its own flags, said again in the words of whoever typed gvproxy's command line or file.

use std::borrow::Cow;

use crate::gvproxy::config::Endpoint;
use crate::gvproxy::origin::Origin;
use crate::output::text::safe;

/// The dataplane's flags, and what stands for them where gvproxy's are typed. What is not here, nobody of them gives.
const FLAGS: [(&str, &str); 20] = [
    ("--listen", "-listen"),
    ("--listen-qemu", "-listen-qemu"),
    ("--listen-vfkit", "-listen-vfkit"),
    ("--listen-bess", "-listen-bess"),
    ("--listen-vpnkit", "-listen-vpnkit"),
    (STDIO, "-listen-stdio"),
    ("--mtu", "-mtu"),
    ("--subnet", "-subnet"),
    ("--gateway", "-gatewayIP"),
    ("--first-guest", "-deviceIP"),
    ("--host-alias", "-hostIP"),
    ("--gateway-mac", "stack.gatewayMacAddress"),
    ("--nat", "stack.nat"),
    ("--virtual-ip", "stack.gatewayVirtualIPs"),
    ("--static-lease", "stack.dhcpStaticLeases"),
    ("--vpnkit-mac", "stack.vpnKitUUIDMacAddresses"),
    ("--dns-search", "stack.dnsSearchDomains"),
    (PUBLISH, "stack.forwards"),
    ("--label", "VNET_LABELS"),
    ("--vm", "VNET_VM"),
];
const STDIO: &str = "--listen-stdio";
const PUBLISH: &str = "--publish";

/// What the flags of one dataplane are called by whoever typed gvproxy's.
#[derive(Debug, Default)]
pub struct Words {
    /// How the dataplane calls a socket, without parameters, and how it was asked for.
    sockets: Vec<(String, String)>,
    /// What asks for a guest on standard input and output.
    stdio: Option<String>,
    /// What asks for forwards.
    forwards: Option<&'static str>,
}

impl Words {
    /// A socket, by the dataplane's flag and URL; `named` is how it was asked for.
    pub(super) fn socket(&mut self, flag: &str, url: &str, at: &Endpoint, named: String) {
        let named = safe(&named).into_owned();
        // In what is wrong with it, as it is passed; in what the system says of it, decoded.
        let mut urls = vec![url.to_owned()];
        if at.path().is_some() {
            urls.push(at.to_string());
        }
        let called = urls.iter().map(|url| safe(&format!("{flag} {url}")).into_owned());
        self.sockets.extend(called.map(|called| (called, named.clone())));
    }

    /// What asks for a guest on standard input and output.
    pub(super) fn stdio(&mut self, from: &Origin) {
        self.stdio = Some(safe(&from.to_string()).into_owned());
    }

    /// What asks for forwards.
    pub(super) fn forwards(&mut self, by: &'static str) {
        self.forwards = Some(by);
    }

    /// Lines of a dataplane's in these words.
    pub fn of(&self, said: &str) -> String {
        let lines: Vec<_> = said.split('\n').map(|line| self.line(line)).collect();
        lines.join("\n")
    }

    fn line(&self, line: &str) -> String {
        let (indent, text) = line.split_at(line.len() - line.trim_start().len());
        let sockets = self.sockets.iter().filter_map(|(called, named)| {
            let rest = text.strip_prefix(called.as_str())?;
            // What it is called by the dataplane alone, as `?name=`, nobody typed.
            let rest = match rest.chars().next() {
                None | Some(' ' | ':' | ',' | ';') => rest,
                Some('?') => &rest[rest.find([' ', ':']).unwrap_or(rest.len())..],
                Some(_) => return None,
            };
            Some((called.len(), named, rest))
        });
        // A path may go on where another one ends.
        match sockets.max_by_key(|(length, ..)| *length) {
            Some((_, named, rest)) => format!("{indent}{named}{}", self.flags(rest)),
            None => format!("{indent}{}", self.flags(text)),
        }
    }

    /// Each flag that stands as a word.
    fn flags(&self, text: &str) -> String {
        let mut words = Vec::new();
        for word in text.split(' ') {
            let end = word.find(|c: char| !c.is_ascii_alphanumeric() && c != '-');
            let (flag, rest) = word.split_at(end.unwrap_or(word.len()));
            words.push(match self.flag(flag) {
                Some(name) => Cow::Owned(format!("{name}{rest}")),
                None => Cow::Borrowed(word),
            });
        }
        words.join(" ")
    }

    fn flag(&self, flag: &str) -> Option<&str> {
        match (flag, &self.stdio, self.forwards) {
            (STDIO, Some(from), _) => Some(from),
            (PUBLISH, _, Some(by)) => Some(by),
            _ => FLAGS.iter().find(|(own, _)| *own == flag).map(|(_, name)| *name),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::gvproxy::flags;

    fn words() -> Words {
        let mut words = Words::default();
        for (flag, path, named) in [
            ("--listen-qemu", "/run/q.sock", "-listen-qemu unix:///run/q.sock"),
            ("--listen", "/run/a", "-listen unix:///run/a"),
            ("--listen", "/run/a b%", "f.yaml:1:10: listen[1] unix:///run/a b%"),
        ] {
            let at = Endpoint::Unix(PathBuf::from(path));
            let url = format!("unix://{}", path.replace('%', "%25"));
            words.socket(flag, &url, &at, named.to_owned());
        }
        words
    }

    #[test]
    fn a_socket_is_called_as_it_was_asked_for() {
        let words = words();
        for (said, told) in [
            (
                "--listen-qemu unix:///run/q.sock cannot be opened; listen where this user may: Permission denied",
                "-listen-qemu unix:///run/q.sock cannot be opened; listen where this user may: Permission denied",
            ),
            (
                "--listen-qemu unix:///run/q.sock?name=web-qemu: another flag listens there too",
                "-listen-qemu unix:///run/q.sock: another flag listens there too",
            ),
            (
                "--listen unix:///run/a cannot be opened",
                "-listen unix:///run/a cannot be opened",
            ),
            (
                "--listen unix:///run/a b% cannot be opened",
                "f.yaml:1:10: listen[1] unix:///run/a b% cannot be opened",
            ),
            (
                "--listen unix:///run/a b%25: the path",
                "f.yaml:1:10: listen[1] unix:///run/a b%: the path",
            ),
            // Not one of these.
            ("--listen unix:///run/abc: x", "-listen unix:///run/abc: x"),
        ] {
            assert_eq!(words.of(said), told);
        }
    }

    #[test]
    fn every_other_flag_is_the_one_that_gvproxy_has() {
        let mut words = words();
        let stdio = "--listen-stdio: standard input and output cannot be a guest's";
        assert_eq!(words.of(stdio), stdio[1..]);
        words.stdio(&Origin::Flag("listen-stdio"));
        words.forwards("-ssh-port");
        assert_eq!(words.of(stdio), stdio[1..]);
        assert_eq!(
            words.of("what --publish asks for cannot be forwarded\n  --gateway-mac, --gateway; --mtu 3"),
            "what -ssh-port asks for cannot be forwarded\n  stack.gatewayMacAddress, -gatewayIP; -mtu 3"
        );
        // Of another program, or none.
        for same in ["vnetctl allow --vm-web", "a--mtu", "--nothing --- --"] {
            assert_eq!(words.of(same), same);
        }
    }

    #[test]
    fn what_stands_for_a_flag_is_one_of_gvproxys() {
        let names: Vec<_> = flags::names().collect();
        for (own, name) in FLAGS {
            let known = match name.strip_prefix('-') {
                Some(flag) => names.contains(&flag),
                None => name.starts_with("stack.") || name.starts_with("VNET_"),
            };
            assert!(known && own.starts_with("--"), "{own} {name}");
        }
    }
}
