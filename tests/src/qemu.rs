//! A real virtual machine: QEMU, and a small Linux that finds its way by DHCP, runs a script and powers off. It is
//! built by `guest/make` out of Debian packages, once for a target directory.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use vnetctl::sandbox::stage;

use crate::process::Running;
use crate::world::World;

/// Names a directory with `vmlinuz` and `initramfs.cpio`, for a machine that cannot download.
const GUEST: &str = "VNET_TEST_GUEST";
/// Emulation boots in three seconds on an idle machine, and runs ten to twenty times slower than this one.
pub const GUEST_PATIENCE: Duration = Duration::from_secs(180);

/// A running machine.
#[derive(Debug)]
pub struct Qemu {
    process: Running,
    directory: PathBuf,
}

impl Qemu {
    /// Boots a guest with one NIC, which runs a script and powers off.
    ///
    /// # Panics
    /// When QEMU is not there.
    pub fn boot(world: &World, netdev: &str, mac: &str, script: &str) -> Qemu {
        Qemu::boot_with(world, netdev, mac, script, &[])
    }

    /// The same with so much of QEMU's own besides.
    fn boot_with(world: &World, netdev: &str, mac: &str, script: &str, more: &[&str]) -> Qemu {
        let guest = guest_directory();
        let directory = world.work();
        let mut command = world.program("qemu-system-x86_64");
        command
            .args(["-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"])
            .args(["-machine", "q35", "-smp", "1", "-m", "256"])
            .args(more)
            // A /dev/kvm that opens need not run this kernel, and a test is not to depend on it.
            .args(["-accel", "tcg", "-cpu", "max"])
            .arg("-kernel")
            .arg(guest.join("vmlinuz"))
            .arg("-initrd")
            .arg(guest.join("initramfs.cpio"))
            .arg("-append")
            .arg(format!(
                "console=ttyS0 quiet panic=-1 reboot=t random.trust_cpu=on mitigations=off rootfstype=ramfs guest.cmd={}",
                base64(script.as_bytes())
            ))
            .args(["-serial", "file:console", "-device", "virtio-serial-pci"])
            .args(["-chardev", "file,id=output,path=output", "-device", "virtserialport,chardev=output,nr=1"])
            .args(["-chardev", "file,id=status,path=status", "-device", "virtserialport,chardev=status,nr=2"])
            .args(["-netdev", netdev])
            .arg("-device")
            .arg(format!("virtio-net-pci,netdev=n0,romfile=,mac={mac}"));
        Qemu {
            process: Running::start(command),
            directory,
        }
    }

    /// Boots a guest that is given programs of this machine, in their places, and has memory for daemons.
    ///
    /// # Panics
    /// When QEMU or a program is not there.
    pub fn boot_with_programs(
        world: &World,
        netdev: &str,
        mac: &str,
        script: &str,
        programs: &[PathBuf],
    ) -> Qemu {
        let disk = pack(world, script, programs);
        let script = "insmod /lib/modules/virtio_blk.ko; tar -xf /dev/vda -C / && sh /root/script";
        let drive = format!("file={},format=raw,if=virtio,readonly=on", disk.display());
        // The later of two amounts holds.
        Qemu::boot_with(world, netdev, mac, script, &["-m", "1024", "-drive", &drive])
    }

    /// Waits until it has powered off; gives what the script printed.
    ///
    /// # Panics
    /// When it did not in time, or did not run the script.
    pub fn wait(self, world: &World) -> String {
        let read = |name: &str| {
            String::from_utf8_lossy(&fs::read(self.directory.join(name)).unwrap_or_default()).into_owned()
        };
        let (mut process, began) = (self.process, Instant::now());
        while !process.has_ended() && began.elapsed() < GUEST_PATIENCE {
            std::thread::sleep(Duration::from_millis(20));
        }
        let ended = process.has_ended();
        let (status, output) = (read("status"), read("output"));
        assert!(
            status.starts_with("exit "),
            "the guest: {status:?}, QEMU ended: {ended}, {}\noutput: {output}\nconsole: {}\npending: {:?}",
            process.stderr(),
            read("console"),
            world.pending()
        );
        output
    }
}

/// QEMU's end of a stream.
pub fn stream(socket: &Path) -> String {
    format!(
        "stream,id=n0,server=off,addr.type=unix,addr.path={}",
        socket.display()
    )
}

/// A raw disk that is an archive: a script, programs by their names in `bin`, and the libraries that they load, in
/// their places.
fn pack(world: &World, script: &str, programs: &[PathBuf]) -> PathBuf {
    let root = world.work().join("root");
    for directory in ["bin", "root"] {
        fs::create_dir_all(root.join(directory)).expect("a test may make a directory");
    }
    fs::write(root.join("root/script"), script).expect("a test may write");
    let mut libraries = BTreeSet::new();
    for program in programs {
        let name = program.file_name().expect("a program has a name");
        // What is there for debuggers is nine tenths of it.
        succeed(
            Command::new("strip")
                .arg("-o")
                .arg(root.join("bin").join(name))
                .arg(program),
        );
        libraries.extend(
            succeed(Command::new("ldd").arg(program))
                .split_whitespace()
                .filter(|word| word.starts_with('/'))
                .map(PathBuf::from),
        );
    }
    for library in libraries {
        let place = root.join(library.strip_prefix("/").expect("it begins with one"));
        fs::create_dir_all(place.parent().expect("it is in a directory"))
            .expect("a test may make a directory");
        fs::copy(&library, &place).expect("what ldd names is there");
    }
    let disk = world.work().join("disk");
    succeed(
        Command::new("tar")
            .arg("-cf")
            .arg(&disk)
            .arg("-C")
            .arg(&root)
            .arg("."),
    );
    disk
}

fn succeed(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Makes the guest where there is a network to download from: not on a stage.
///
/// # Panics
/// When it cannot be made.
pub fn build_guest() {
    if stage::inside() || std::env::var_os(GUEST).is_some() {
        return;
    }
    let made = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/make"))
        .arg(guest_directory())
        .output()
        .expect("bash runs guest/make");
    assert!(
        made.status.success(),
        "{} (or name a directory with a guest in {GUEST})",
        String::from_utf8_lossy(&made.stderr)
    );
}

fn guest_directory() -> PathBuf {
    std::env::var_os(GUEST).map_or_else(
        || {
            // TARGET/PROFILE/deps/TEST
            let own = std::env::current_exe().expect("a test knows its file");
            own.ancestors()
                .nth(3)
                .expect("a test lies in a target directory")
                .join("guest")
        },
        PathBuf::from,
    )
}

/// RFC 4648 §4.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let group = [chunk[0], *chunk.get(1).unwrap_or(&0), *chunk.get(2).unwrap_or(&0)];
        let bits = u32::from_be_bytes([0, group[0], group[1], group[2]]);
        for position in 0..4 {
            let index = (bits >> (18 - 6 * position)) & 63;
            text.push(if position <= chunk.len() {
                ALPHABET[index as usize] as char
            } else {
                '='
            });
        }
    }
    text
}
