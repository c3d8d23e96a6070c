//! Sockets of the host that lead to some of the guest, over SSH: `forwards` and the four `-forward-*` flags.

use std::path::{Path, PathBuf};

use super::endpoint::{self, Endpoint, Schemes};
use super::{Check, Problem, SshForward};
use crate::gvproxy::flags::Flags;
use crate::gvproxy::origin::{Given, Origin};
use crate::gvproxy::yaml::ForwardKeys;

impl Check<'_> {
    pub(super) fn ssh_forwards(&mut self, flags: &Flags, keys: Vec<ForwardKeys>) -> Vec<SshForward> {
        let (socks, dests) = (&flags.forward_sock, &flags.forward_dest);
        let (users, identities) = (&flags.forward_user, &flags.forward_identity);
        let mut forwards = Vec::new();
        for key in keys {
            let identity = key.identity.map(|given| given.map(PathBuf::from));
            forwards.extend(self.ssh_forward(key.from, key.socket, key.dest, key.user, identity));
        }
        if [dests.len(), users.len(), identities.len()] != [socks.len(); 3] {
            self.problems.push(Problem::ForwardFlags {
                socks: socks.len(),
                dests: dests.len(),
                users: users.len(),
                identities: identities.len(),
            });
            return forwards;
        }
        let given = socks.iter().zip(dests).zip(users).zip(identities);
        for (((sock, dest), user), identity) in given {
            let text = |flag, value: &String| {
                let given = Given::flag(flag, value.clone());
                (!value.is_empty()).then_some(given)
            };
            let identity = Given::flag("forward-identity", identity.clone());
            forwards.extend(self.ssh_forward(
                Origin::Flag("forward-sock"),
                text("forward-sock", sock),
                text("forward-dest", dest),
                text("forward-user", user),
                Some(identity).filter(|given| !given.value.as_os_str().is_empty()),
            ));
        }
        forwards
    }

    fn ssh_forward(
        &mut self,
        from: Origin,
        socket: Option<Given<String>>,
        dest: Option<Given<String>>,
        user: Option<Given<String>>,
        identity: Option<Given<PathBuf>>,
    ) -> Option<SshForward> {
        let missing = [
            ("socket", socket.is_none()),
            ("dest", dest.is_none()),
            ("user", user.is_none()),
            ("identity", identity.is_none()),
        ];
        for (key, is_missing) in missing {
            if is_missing {
                let from = from.clone();
                self.problems.push(Problem::SshIncomplete { from, key });
            }
        }
        if let Some(identity) = &identity {
            let (from, path) = (identity.from.clone(), identity.value.clone());
            match (self.host.exists)(&path) {
                Ok(true) => {}
                Ok(false) => self.problems.push(Problem::NoIdentity { from, path }),
                Err(source) => self.problems.push(Problem::Identity { from, path, source }),
            }
        }
        if let Some(dest) = dest.as_ref().filter(|dest| !dest.value.starts_with('/')) {
            self.problems.push(Problem::SshDest {
                from: dest.from.clone(),
                found: dest.value.clone(),
            });
        }
        let socket = socket.and_then(|given| self.ssh_socket(given));
        Some(SshForward {
            socket: socket?,
            dest: dest?.value,
            user: user?.value,
            identity: identity?.value,
        })
    }

    /// The host's socket of a forward: a URL or a path.
    fn ssh_socket(&mut self, given: Given<String>) -> Option<PathBuf> {
        let Given { value: found, from } = given;
        if found.starts_with("npipe:") {
            self.problems.push(Problem::NamedPipe { from, found });
            return None;
        }
        let parsed = if found.contains("://") {
            Endpoint::parse(&found, Schemes::Unix)
        } else {
            endpoint::check_length(found.len()).map(|()| Endpoint::Unix(PathBuf::from(&found)))
        };
        let at = match parsed {
            Ok(at) => at,
            Err(source) => {
                self.problems.push(Problem::Endpoint { from, found, source });
                return None;
            }
        };
        let path = at.path().map(Path::to_owned);
        if let Some(other) = self.listeners.insert(at.clone(), from.clone()) {
            self.problems.push(Problem::ListenTwice { from, at, other });
        }
        path
    }
}
