# Homebrew formula. `make dist` fills in the two places for the source archive that it builds, and writes
# dist/kvstore.rb. A formula is installed from a tap, which may be a local one:
#
#   brew tap-new kvstore/local
#   cp dist/kvstore.rb "$(brew --repository kvstore/local)/Formula/"
#   brew install kvstore/local/kvstore && brew services start kvstore
#
# The dependencies are installed by pip at the versions of constraints.txt, from wherever pip is told to look.
class Kvstore < Formula
  include Language::Python::Virtualenv

  desc "Persistent KV prefix cache store for MLX inference"
  url "@URL@"
  sha256 "@SHA256@"
  license "Apache-2.0"

  depends_on arch: :arm64
  depends_on macos: :sonoma
  depends_on "python@3.13"

  def install
    virtualenv_create(libexec, "python3.13", system_site_packages: false, without_pip: false)
    system libexec/"bin/python", "-m", "pip", "install", "--constraint", "constraints.txt", buildpath.to_s
    bin.install_symlink libexec/"bin/kvstore"
    generate_completions_from_executable(bin/"kvstore", shell_parameter_format: :click)
  end

  # As deploy/dev.kvstore.daemon.plist. The daemon raises its limit on open files by itself.
  service do
    run [opt_bin/"kvstore", "serve"]
    keep_alive successful_exit: false
    process_type :adaptive
    error_log_path var/"log/kvstore.log"
  end

  test do
    assert_match version.to_s, shell_output("#{bin}/kvstore --version")
    assert_match "durability", shell_output("#{bin}/kvstore config show")
  end
end
