//! Lists that travel with a policy: packed by who reads the files, unpacked and checked where the policy is
//! applied. The only place that reads such files is [`read`], for the operator's own `--network-policy` and
//! for vnetctl; applying a policy opens nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;
use sha2::{Digest as _, Sha256};
use vnet_proto::v1;

use crate::policy::{Attachment, Attachments, LISTS_BYTES_MAX, list_paths};

/// Bytes that the lists of a policy may have together as they travel, compressed.
pub const PACKED_BYTES_MAX: usize = 24 << 20;

/// Why lists are refused. No message says what a file holds.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// A list comes twice.
    #[error("list {0:?} comes twice; send it once")]
    Twice(String),
    /// It does not unpack.
    #[error("list {0:?} does not unpack (expected its content compressed as RFC 1950 says)")]
    Packing(String),
    /// It is another file than its digest says.
    #[error("list {path:?} has the digest {found} (expected {expected}); send it again")]
    Digest {
        /// The list.
        path: String,
        /// What its content has.
        found: String,
        /// What the message says.
        expected: String,
    },
    /// Together too long.
    #[error("the lists have more than {LISTS_BYTES_MAX} bytes together; split the policy")]
    TooLong,
    /// Together too long as they travel.
    #[error("the lists have {0} bytes together, compressed (at most {PACKED_BYTES_MAX}); split the policy")]
    PackedTooLong(usize),
    /// A file cannot be read.
    #[error("cannot read list {path:?}")]
    Read {
        /// The list.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not a file: a device or a pipe would never end, a directory has no lines.
    #[error("list {0:?} is not a regular file")]
    NotAFile(String),
}

/// Packs the content of a list that a document names by `path`.
pub fn pack(path: &str, content: &[u8]) -> v1::PolicyList {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
    // Writing to a vector does not fail.
    let packed = encoder.write_all(content).and_then(|()| encoder.finish());
    v1::PolicyList {
        path: path.to_owned(),
        sha256: digest(content),
        content: packed.unwrap_or_default(),
        size_bytes: content.len() as u64,
    }
}

/// Unpacks lists, and checks each against its digest.
///
/// # Errors
/// [`ListError`].
pub fn unpack(lists: &[v1::PolicyList]) -> Result<Attachments, ListError> {
    let mut found = BTreeMap::new();
    let mut room = LISTS_BYTES_MAX as u64;
    for list in lists {
        let path = || list.path.clone();
        let mut content = Vec::new();
        // No more is unpacked than may be kept, whatever the message says of its size.
        let read = ZlibDecoder::new(&list.content[..])
            .take(room + 1)
            .read_to_end(&mut content);
        read.map_err(|_| ListError::Packing(path()))?;
        room = room.checked_sub(content.len() as u64).ok_or(ListError::TooLong)?;
        let digest = digest(&content);
        if digest != list.sha256 {
            return Err(ListError::Digest {
                path: path(),
                found: digest,
                expected: list.sha256.chars().take(64).collect(),
            });
        }
        let attachment = Attachment {
            digest,
            content: content.into(),
        };
        if found.insert(path(), attachment).is_some() {
            return Err(ListError::Twice(path()));
        }
    }
    Ok(Attachments(found))
}

/// Lists without their content.
pub fn described(lists: &[v1::PolicyList]) -> Vec<v1::PolicyList> {
    let described = |list: &v1::PolicyList| v1::PolicyList {
        path: list.path.clone(),
        sha256: list.sha256.clone(),
        content: Vec::new(),
        size_bytes: list.size_bytes,
    };
    lists.iter().map(described).collect()
}

/// Reads and packs the lists that a document names, by their paths relative to `directory`. What the
/// document has wrong otherwise is left to its own check.
///
/// # Errors
/// [`ListError`].
pub fn read(document: &str, directory: &Path) -> Result<Vec<v1::PolicyList>, ListError> {
    let mut lists = Vec::new();
    let mut room = LISTS_BYTES_MAX as u64;
    for path in list_paths(document) {
        let content = read_file(&path, &directory.join(&path), room)?;
        room -= content.len() as u64;
        lists.push(pack(&path, &content));
    }
    let packed = lists.iter().map(|list| list.content.len()).sum();
    if packed > PACKED_BYTES_MAX {
        return Err(ListError::PackedTooLong(packed));
    }
    Ok(lists)
}

fn read_file(path: &str, file: &Path, room: u64) -> Result<Vec<u8>, ListError> {
    let failed = |source| ListError::Read {
        path: path.to_owned(),
        source,
    };
    // A pipe would wait for a writer.
    let mut options = File::options();
    options
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK | nix::libc::O_CLOEXEC);
    let file = options.open(file).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(ListError::NotAFile(path.to_owned()));
    }
    let mut content = Vec::new();
    file.take(room + 1).read_to_end(&mut content).map_err(failed)?;
    if content.len() as u64 > room {
        return Err(ListError::TooLong);
    }
    Ok(content)
}

fn digest(content: &[u8]) -> String {
    Sha256::digest(content)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_unpacks_and_keeps_its_digest() {
        let list = pack("l/a.txt", b"a.example\n");
        assert_eq!(list.sha256.len(), 64);
        let unpacked = unpack(std::slice::from_ref(&list)).unwrap();
        assert_eq!(&*unpacked.0["l/a.txt"].content, b"a.example\n");
        assert!(described(&[list])[0].content.is_empty());
    }

    #[test]
    fn a_list_that_is_not_what_its_digest_says_is_refused() {
        let list = v1::PolicyList {
            content: pack("a", b"b.example\n").content,
            ..pack("a", b"a.example\n")
        };
        let told = unpack(&[list]).unwrap_err().to_string();
        assert!(
            told.contains("has the digest") && !told.contains("example"),
            "{told}"
        );
        let torn = v1::PolicyList {
            content: vec![1, 2, 3],
            ..pack("a", b"")
        };
        assert!(matches!(unpack(&[torn]), Err(ListError::Packing(_))));
        let twice = [pack("a", b"x"), pack("a", b"x")];
        assert!(matches!(unpack(&twice), Err(ListError::Twice(_))));
    }

    #[test]
    fn a_list_that_unpacks_to_more_than_the_limit_is_refused_without_being_kept() {
        // 65 MiB of one byte travel as 65 KiB.
        let bomb = pack("a", &vec![b'\n'; LISTS_BYTES_MAX + 1]);
        assert!(bomb.content.len() < 1 << 20);
        assert!(matches!(unpack(&[bomb]), Err(ListError::TooLong)));
        let half = pack("a", &vec![b'\n'; LISTS_BYTES_MAX / 2 + 1]);
        let other = v1::PolicyList {
            path: "b".into(),
            ..half.clone()
        };
        assert!(matches!(unpack(&[half, other]), Err(ListError::TooLong)));
    }

    #[test]
    fn lists_are_read_beside_the_policy_and_only_regular_files_are() {
        let dir = std::env::temp_dir().join(format!("vnet-lists-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("l")).unwrap();
        std::fs::write(dir.join("l/a.txt"), "a.example\n").unwrap();
        let named = |path: &str| format!("sets:\n  a: {{file: {path:?}}}\n");
        let lists = read(&named("l/a.txt"), &dir).unwrap();
        assert_eq!((lists.len(), lists[0].path.as_str()), (1, "l/a.txt"));
        assert!(matches!(read(&named("l"), &dir), Err(ListError::NotAFile(_))));
        assert!(matches!(
            read(&named("/dev/zero"), &dir),
            Err(ListError::NotAFile(_))
        ));
        assert!(matches!(
            read(&named("none.txt"), &dir),
            Err(ListError::Read { .. })
        ));
        let pipe = dir.join("pipe");
        let _ = nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR);
        assert!(matches!(read(&named("pipe"), &dir), Err(ListError::NotAFile(_))));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
