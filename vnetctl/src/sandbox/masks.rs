//! What is hidden from a command, because whoever listens there would reach the network for it: the
//! sockets of the system's resolver, name services, D-Bus, service managers, container engines, virtual
//! machine managers and terminal multiplexers, and what the caller adds.
//!
//! That no socket from outside can be connected to is the work of `sockets`, wherever it is. Hiding the known
//! ones has programs see at once that they are not there, and hides what lies beside them.
//!
//! Directories for sockets ([`Places::rebuilt`]) are replaced by copies that hold everything else, so that a
//! service which is started or restarted later does not appear in the guest either. Elsewhere a directory
//! is covered by an empty one and a socket by an empty file.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::launch::{absolute, home_dir};

/// Directories that hold sockets, hidden wherever they are.
const SYSTEM: &[&str] = &[
    // The whole of systemd: resolver, manager, network, import and machine services.
    "/run/systemd",
    "/run/dbus",
    // Name services.
    "/run/nscd",
    "/var/run/nscd",
    "/run/nslcd",
    "/run/avahi-daemon",
    "/run/samba/winbindd",
    "/run/mdnsd",
    "/var/run/mdnsd",
    "/var/run/mDNSResponder",
    "/var/lib/sss/pipes",
    "/var/lib/samba/winbindd_privileged",
    "/var/cache/nscd",
    // Container engines.
    "/run/docker.sock",
    "/var/run/docker.sock",
    "/run/docker",
    "/run/containerd",
    "/run/docker-containerd",
    "/run/podman",
    "/run/crio",
    "/run/buildkit",
    "/run/k3s",
    "/run/dockershim.sock",
    "/run/cri-dockerd.sock",
    "/run/firecracker-containerd",
    "/run/nerdctl",
    "/run/lxd.socket",
    "/run/lxc",
    "/run/snapd.socket",
    "/run/snapd-snap.socket",
    "/var/lib/lxd/unix.socket",
    "/var/lib/incus/unix.socket",
    "/var/snap/lxd/common/lxd/unix.socket",
    "/var/lib/docker",
    // Machine managers, and networks that answer on a socket.
    "/run/libvirt",
    "/var/run/libvirt",
    "/run/tailscale",
    "/var/run/tailscale",
    "/run/NetworkManager",
    "/run/wpa_supplicant",
    "/run/netns",
    // Terminal multiplexers run commands outside.
    "/run/screen",
    "/run/tmux",
    "/tmp/screens",
];

/// Below the user's runtime directory.
const RUNTIME: &[&str] = &[
    "bus",
    "dbus-1",
    "at-spi",
    "systemd",
    "vnet",
    "docker.sock",
    "docker",
    "docker.pid",
    "dockerd-rootless",
    "containerd",
    "containerd-rootless",
    "podman",
    "libpod",
    "buildkit",
    "buildkit-default",
    "crio",
    "libvirt",
    "gvfs",
    "gvfsd",
    "doc",
    "flatpak",
    "tmux",
    "screen",
];

/// Below the user's home directory.
const HOME: &[&str] = &[
    ".docker/run",
    ".docker/desktop",
    ".colima/default/docker.sock",
    ".rd/docker.sock",
    ".local/share/containers/podman/machine",
    ".screen",
];

/// Variables that hold the address of a bus, an engine or a multiplexer.
const VARIABLES: &[&str] = &[
    "DBUS_SESSION_BUS_ADDRESS",
    "DBUS_SYSTEM_BUS_ADDRESS",
    "AT_SPI_BUS_ADDRESS",
    "DOCKER_HOST",
    "CONTAINER_HOST",
    "CONTAINERD_ADDRESS",
    "BUILDKIT_HOST",
    "LIBVIRT_DEFAULT_URI",
    "TMUX",
];

/// What to hide, as the caller's environment has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Places {
    /// Directories to be replaced by copies without what is hidden, outer ones first.
    pub(crate) rebuilt: Vec<PathBuf>,
    /// Files and directories to hide; need not exist.
    pub(crate) hidden: Vec<PathBuf>,
}

/// The built-in places and the caller's, by user and environment.
pub(crate) fn places(uid: u32, variable: impl Fn(&str) -> Option<OsString>, callers: Vec<PathBuf>) -> Places {
    let absolute = |name: &str| absolute(&variable, name);
    let standard = PathBuf::from(format!("/run/user/{uid}"));
    let mut runtime_directories = vec![standard.clone()];
    runtime_directories.extend(absolute("XDG_RUNTIME_DIR").filter(|directory| *directory != standard));
    let home = home_dir(uid, &variable);

    let mut hidden: Vec<PathBuf> = SYSTEM.iter().map(PathBuf::from).collect();
    for directory in &runtime_directories {
        hidden.extend(RUNTIME.iter().map(|name| directory.join(name)));
    }
    if let Some(home) = &home {
        hidden.extend(HOME.iter().map(|name| home.join(name)));
    }
    let temporary = absolute("TMUX_TMPDIR").unwrap_or_else(|| "/tmp".into());
    hidden.push(temporary.join(format!("tmux-{uid}")));
    for name in VARIABLES {
        if let Some(value) = variable(name).and_then(|value| value.into_string().ok()) {
            hidden.extend(socket_paths(&value));
        }
    }
    hidden.extend(callers);

    let mut rebuilt = vec![PathBuf::from("/run")];
    // Never the home directory or what holds it: what the command writes there is to stay.
    let holds_home = |directory: &PathBuf| home.as_ref().is_some_and(|home| home.starts_with(directory));
    rebuilt.extend(
        runtime_directories
            .into_iter()
            .filter(|directory| !holds_home(directory)),
    );
    Places { rebuilt, hidden }
}

/// The paths of sockets in an address: `unix:path=/run/bus,guid=1;...`, `unix:///run/docker.sock`,
/// `/tmp/tmux-1000/default,123,0`.
fn socket_paths(address: &str) -> Vec<PathBuf> {
    address
        .split([',', ';'])
        .filter_map(|part| {
            let path = part
                .strip_prefix("unix:path=")
                .or_else(|| part.strip_prefix("unix://"))
                .or_else(|| part.starts_with('/').then_some(part))?;
            let path = Path::new(path);
            // Never a directory as wide as this: a mistaken variable must not empty the file system.
            (path.is_absolute() && path.components().count() > 2).then(|| path.to_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_in_variables_are_hidden() {
        let variable = |name: &str| {
            let value = match name {
                "XDG_RUNTIME_DIR" => "/tmp/runtime",
                "DBUS_SESSION_BUS_ADDRESS" => "unix:path=/tmp/dbus-1,guid=ab;tcp:host=x",
                "DOCKER_HOST" => "unix:///home/u/engine.sock",
                "TMUX" => "/tmp/mux/default,77,0",
                _ => return None,
            };
            Some(OsString::from(value))
        };
        let places = places(1000, variable, vec!["/state/vnet".into()]);
        for path in [
            "/tmp/dbus-1",
            "/home/u/engine.sock",
            "/tmp/mux/default",
            "/tmp/tmux-1000",
            "/tmp/runtime/bus",
            "/run/user/1000/podman",
            "/run/dbus",
            "/state/vnet",
        ] {
            assert!(
                places.hidden.contains(&PathBuf::from(path)),
                "{path} is not hidden"
            );
        }
        let rebuilt: Vec<_> = places.rebuilt.iter().map(|path| path.to_str().unwrap()).collect();
        assert_eq!(rebuilt, ["/run", "/run/user/1000", "/tmp/runtime"]);
    }

    #[test]
    fn home_is_never_replaced_by_a_copy() {
        let variable = |name: &str| match name {
            "HOME" => Some(OsString::from("/home/u")),
            "XDG_RUNTIME_DIR" => Some(OsString::from("/home")),
            _ => None,
        };
        let rebuilt = places(7, variable, Vec::new()).rebuilt;
        assert_eq!(rebuilt, [PathBuf::from("/run"), PathBuf::from("/run/user/7")]);
    }

    #[test]
    fn mistaken_variables_hide_nothing_wide() {
        assert!(socket_paths("/tmp").is_empty());
        assert!(socket_paths("tcp://127.0.0.1:2375").is_empty());
        assert!(socket_paths("unix:///").is_empty());
    }
}
