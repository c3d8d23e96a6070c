//! The file of `-pid-file`: this process's id in digits, without a line's end, as gvproxy writes it. Removed at the
//! end, also at one by an error, if it is still this process's.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// The file, for as long as this lives.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    text: String,
}

impl PidFile {
    /// Writes it. One that is there is replaced: it is of a process that ended otherwise. So is a link, whoever made it,
    /// and nothing is written where it leads.
    ///
    /// # Errors
    /// The system's.
    pub fn write(path: PathBuf) -> io::Result<Self> {
        let text = std::process::id().to_string();
        match fs::metadata(&path) {
            // A device or a pipe, which is not to be replaced by a file.
            Ok(found) if !found.is_file() => fs::write(&path, &text)?,
            _ => replace(&path, text.as_bytes())?,
        }
        Ok(Self { path, text })
    }
}

/// Puts a file in the place of whatever is there, whole from its first moment.
fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    // So that nobody has made one of its name before.
    let random = getrandom::u64().map_err(|error| io::Error::other(error.to_string()))?;
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    name.push(format!(".{random:016x}"));
    let beside = path.with_file_name(name);
    let mut file = fs::File::options()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&beside)?;
    let written = file.write_all(text).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Another that was started meanwhile keeps its own.
        if fs::read(&self.path).is_ok_and(|found| found == self.text.as_bytes()) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn it_holds_the_digits_alone_and_goes_with_its_process_only() {
        let path = std::env::temp_dir().join(format!("vnetctl-pid-{}", std::process::id()));
        fs::write(&path, "1\n").unwrap();

        let file = PidFile::write(path.clone()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), std::process::id().to_string());
        drop(file);
        assert!(!path.exists());

        let file = PidFile::write(path.clone()).unwrap();
        fs::write(&path, "another").unwrap();
        drop(file);
        assert_eq!(fs::read_to_string(&path).unwrap(), "another");
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_link_is_replaced_and_nothing_is_written_where_it_leads() {
        let directory = std::env::temp_dir().join(format!("vnetctl-pid-link-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let [path, target] = ["gv.pid", "target"].map(|name| directory.join(name));
        fs::write(&target, "precious").unwrap();
        for leads_to in [&target, &directory.join("nothing")] {
            symlink(leads_to, &path).unwrap();
            let file = PidFile::write(path.clone()).unwrap();
            let found = fs::symlink_metadata(&path).unwrap();
            assert!(found.is_file(), "{found:?}");
            assert_eq!(found.permissions().mode() & 0o777, 0o644);
            drop(file);
            assert_eq!(fs::read_to_string(&target).unwrap(), "precious");
            let left: Vec<_> = fs::read_dir(&directory)
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            assert_eq!(left, ["target"]);
        }
        // What is no file stays what it is.
        let file = PidFile::write("/dev/null".into()).unwrap();
        drop(file);
        assert!(!fs::symlink_metadata("/dev/null").unwrap().is_file());
        fs::remove_dir_all(&directory).unwrap();
    }
}
